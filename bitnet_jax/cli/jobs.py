"""``demo`` and ``compress``: the main job on our text, and on the user's model and text."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ..errors import BitnetError
from ..output import check_output, prepare_output
from .checks import Json


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a small language model on this machine's Python source, then make it ternary.

    Measures the float model, converts it, fine-tunes it through the straight-through estimator,
    packs it, reloads it, verifies it and writes a report. No download; under five minutes on two
    CPU cores.
    """

    out: Path | None = None
    """New folder for model and report; by default bitnet-demo, or bitnet-demo-2, -3, ..."""
    epochs: int = 3
    """Epochs of fine-tuning."""
    json: Json = None
    """Also write the report's figures to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import demo, phase4

        _check_epochs(self.epochs)
        out = prepare_output(self.out or _free_folder("bitnet-demo"))
        job = phase4.Settings(epochs=self.epochs)
        result = demo.run(out, job=job, console=console)
        _show(result, out, console)
        return result


@dataclasses.dataclass(frozen=True)
class Compress:
    """Make your own model ternary: measure, plan, convert, fine-tune, pack, verify, report.

    MODEL is a model folder of ours; a Hugging Face folder or a .gguf file of the Llama family; a
    Phase 3 checkpoint; or PyTorch weights (safetensors, also sharded, or .pt) with the network they
    are for, --module net.py:Net: a flax.linen module from tokens to logits whose ternary layers
    take a scheme. Without --data any weights are converted, packed and verified leaf by leaf, and
    nothing is trained.
    """

    model: tyro.conf.Positional[Path]
    """The full-precision model."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New folder: the packed model in DIR/packed, the float one in DIR/float32, the report."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Text: a file, a folder, or .jsonl with the key text. A tenth is held out to measure on."""
    target_ratio: Annotated[float | None, tyro.conf.arg(metavar="RATIO")] = None
    """Plan formats part by part, ternary to float16, to be so many times smaller than float32."""
    scheme: Literal["absmean", "twn", "threshold", "sherry", "int8", "int4"] | None = None
    """How weights become codes: ternary (sherry: one of four is 0, 1.25 bits), or integers.
    By default absmean; twn for a Phase 3 network and without --data."""
    scale: Annotated[str | None, tyro.conf.arg(metavar="tensor|channel|N")] = None
    """What shares a scale; N are consecutive inputs of an output. By default each rule's own."""
    start: Literal["data", "rule"] = "data"
    """Convert by what the text does to each matrix, or by the rule of --scheme alone."""
    embeddings: Literal["float32", "float16", "int8", "int4"] = "float16"
    """What embeddings and head are kept in."""
    epochs: int = 3
    """Epochs of fine-tuning; 0 packs what was converted, without training."""
    max_loss: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    """Exit with 1 if more of the accuracy is lost: 0.05 and 5 mean 5 %. The model is kept."""
    module: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:NAME")] = None
    """The network the weights are for; the file is run."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """A tokenizer.json, or bytes; by default the one beside the weights."""
    resume: bool = False
    """Go on with the interrupted job in DIR; give the same arguments again."""
    batch: int = 8
    """Windows of text in memory at once."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step."""
    patience: int | None = None
    """Stop after so many epochs without a lower held-out loss; the best weights are packed."""
    distill: float | None = None
    """Weight of the float model's distribution in the loss, 0..1; 0.5 by default."""
    temperature: float = 1.0
    """Of both distributions then."""
    teacher: Literal["source", "continued"] | None = None
    """Which float model that is: as it came (of Phase 3), or continued on the same text."""
    relation: float = 0.0
    """Weight of the teacher's attention relations in the loss (BitDistill); 100 to 400 is usual."""
    warmup: float = 0.0
    """Share of the steps in which quantisation sets in slowly."""
    learn_scales: bool = False
    """Train the scales too (ParetoQ)."""
    dead_zone: float = 0.0
    """Strength of Tequila's term for weights with code 0; 1e-3 is usual. Fades to 0."""
    residual: bool = False
    """Add a float product that fades away (Sherry)."""
    sub_norms: bool = False
    """Put norms before the output projections, as BitNet has them; changes the function."""
    schedule: Literal["cosine", "two-stage"] = "cosine"
    """Of the learning rate; two-stage also ends weight decay at half time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in; for model folders of ours."""
    length: int = 128
    """Tokens a window."""
    optimizer: Literal["adamw", "mugrokfast"] = "adamw"
    """AdamW, or Muon for the matrices and AdamW for the rest."""
    learning_rate: float | None = None
    """Peak, decays to zero; 2e-3, for Phase 3 5e-4."""
    compare: bool = True
    """Also continue the float model on the same text, the honest yardstick; not for Phase 3."""
    architecture: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Of a Phase 3 checkpoint whose own JSON does not tell its network's shape."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Fields of its shape that no file tells: n_heads=5 sw_window=1024 ..."""
    latent: bool = False
    """Also hand the latent weights on to Phase 5, in DIR/phase5."""
    seed: int = 0
    """Fixes the order of the text and the sampling."""
    tensorboard: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Also draw the trainings' curves for TensorBoard, in this folder."""
    wandb: Annotated[str | None, tyro.conf.arg(metavar="PROJECT")] = None
    """Also send the trainings' curves to this project of Weights & Biases."""
    json: Json = None
    """Also write the report's figures to this file."""

    def __call__(self, console: Console) -> dict:
        from .. import compress, phase4

        if self.data is None:
            return self._pack_only(console)
        if self.epochs < 0:
            raise BitnetError(f"--epochs {self.epochs}: give 0 (no training) or more")
        bound = _share(self.max_loss)
        for name in ("batch", "length", "accumulate", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise BitnetError(f"--{name} {value}: must be 1 or more")
        if not 0 <= (self.distill or 0) <= 1 or not self.temperature > 0:
            raise BitnetError("--distill is a share of 0..1, --temperature a number above 0")
        if not 0 <= self.warmup <= 1 or min(self.relation, self.dead_zone) < 0:
            raise BitnetError("--warmup is a share of 0..1, --relation and --dead-zone 0 or more")
        check_output(self.out, self.resume)
        with console.status("reading model and text", spinner="line"):
            source = self._source(console)
            source = compress.computed_in(source, self.dtype)
            text = compress.load_text(self.data, source, self.length)
        same = {f.name for f in dataclasses.fields(phase4.Settings)} - {"scheme", "policy"}
        given = {k: v for k, v in vars(self).items() if k in same and v is not None}
        family = compress.defaults(source)
        if self.compare and "compare" in family:
            del given["compare"]
        settings = phase4.Settings(
            **{**family, **given},
            scheme=self._scheme("twn" if family else "absmean"),
            policy=compress.make_policy(self.embeddings, source),
        )
        if self.target_ratio is not None:
            settings = compress.planned(source, text, settings, self.target_ratio, console)
        sinks = self._sinks()
        prepare_output(self.out, self.resume)
        result = compress.run(
            source, text, self.out, settings, console, sinks, self.model, self.latent
        )
        _show(result, self.out, console)
        return self._judged(result, bound)

    def _judged(self, result: dict, bound: float | None) -> dict:
        """The result, marked as failed if it lost more, or is larger, than was allowed."""
        lost = result.get("disagreement", result.get("relative_accuracy_loss", 0.0))
        ratio, told = result["ratio_on_disk"], ""
        if bound is not None and lost > bound:
            told = f"lost {100 * lost:.2f} % of the accuracy, --max-loss allows {100 * bound:.2f} %"
        elif self.target_ratio is not None and ratio < self.target_ratio:
            told = f"{ratio:.2f}x smaller on disk, --target-ratio asks for {self.target_ratio:g}x"
        if told:
            return result | {"failed": f"{told}; the model and its report are in {self.out}"}
        return result

    def _scheme(self, rule: str):
        from .. import compress

        scale = int(self.scale) if self.scale and self.scale.isdigit() else self.scale
        return compress.make_scheme(self.scheme or rule, scale)

    def _source(self, console: Console):
        from .. import compress

        overrides = compress.parse_fields(self.set)
        return compress.load_source(
            self.model, self.module, self.tokenizer, console, self.architecture, overrides
        )

    def _pack_only(self, console: Console) -> dict:
        """Weights alone: converted by the rule, packed, verified."""
        from .. import compress, shrink

        if self.max_loss is not None or self.resume:
            raise BitnetError("--max-loss and --resume need text to measure on; give --data")
        check_output(self.out)
        with console.status("reading the weights", spinner="line"):
            overrides = compress.parse_fields(self.set)
            source = compress.load_weights(
                self.model, self.module, self.tokenizer, console, self.architecture, overrides
            )
        scheme, policy = self._scheme("twn"), compress.make_policy(self.embeddings, source)
        if self.target_ratio is not None:
            policy = compress.plan_for(source, scheme, policy, self.target_ratio, console=console)
        prepare_output(self.out)
        result = compress.pack_only(source, self.out, policy, scheme, self.model, console)
        console.print(shrink.table(result))
        for line in shrink.summary(result):
            console.print(line, highlight=False)
        console.print(f"Packed: {self.out / 'packed'}    report: {self.out / 'report.txt'}")
        return self._judged(result, None)

    def _sinks(self) -> list:
        from ..train import sinks

        found = [] if self.tensorboard is None else [sinks.tensorboard(self.tensorboard)]
        return found + ([] if self.wandb is None else [sinks.wandb(self.wandb)])


def _check_epochs(epochs: int) -> None:
    if epochs < 1:
        raise BitnetError(f"--epochs {epochs}: fine-tuning needs at least 1")


def _share(bound: float | None) -> float | None:
    """A share of 0.05 or 5 %: nobody means a bound of 100 % or more."""
    if bound is None:
        return None
    if not 0 <= bound < 100:
        raise BitnetError(f"--max-loss {bound}: give a share such as 0.05, or percent such as 5")
    return bound if bound < 1 else bound / 100


def _show(result: dict, out: Path, console: Console) -> None:
    from .. import report

    console.print()
    console.print(report.text(result, console.width), markup=False, highlight=False, end="")
    console.print(f"\nPacked model: {out / 'packed'}    report: {out / 'report.txt'} and .png")


def _free_folder(name: str) -> Path:
    n = 1
    while (path := Path(name if n == 1 else f"{name}-{n}")).exists():
        n += 1
    return path
