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
    """Make your own language model ternary: measure, convert, fine-tune, pack, verify, report.

    MODEL is a model folder of ours, or PyTorch weights (safetensors, also sharded, or .pt) together
    with the network they are for, --module net.py:Net: a flax.linen module from tokens to logits
    whose ternary layers take a scheme.
    """

    model: tyro.conf.Positional[Path]
    """The full-precision model."""
    data: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Text: a file, a folder, or .jsonl with the key text. A tenth is held out to measure on."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New folder: the packed model in DIR/packed, the float one in DIR/float32, the report."""
    scheme: Literal["absmean", "twn", "threshold", "sherry", "int8", "int4"] = "absmean"
    """How weights become codes: ternary (sherry: one of four is 0, 1.25 bits), or integers."""
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
    distill: float = 0.5
    """Weight of the float model's distribution in the loss, 0..1."""
    temperature: float = 1.0
    """Of both distributions then."""
    teacher: Literal["source", "continued"] = "continued"
    """Which float model that is: as it came, or continued on the same text."""
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
    learning_rate: float = 2e-3
    """Peak; decays to zero."""
    compare: bool = True
    """Also continue the float model on the same text, the honest yardstick (and the teacher)."""
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

        if self.epochs < 0:
            raise BitnetError(f"--epochs {self.epochs}: give 0 (no training) or more")
        bound = _share(self.max_loss)
        for name in ("batch", "length", "accumulate", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise BitnetError(f"--{name} {value}: must be 1 or more")
        if not 0 <= self.distill <= 1 or not self.temperature > 0:
            raise BitnetError("--distill is a share of 0..1, --temperature a number above 0")
        if not 0 <= self.warmup <= 1 or min(self.relation, self.dead_zone) < 0:
            raise BitnetError("--warmup is a share of 0..1, --relation and --dead-zone 0 or more")
        scale = int(self.scale) if self.scale and self.scale.isdigit() else self.scale
        same = {f.name for f in dataclasses.fields(phase4.Settings)} - {"scheme", "policy"}
        settings = phase4.Settings(
            scheme=compress.make_scheme(self.scheme, scale),
            policy=compress.make_policy(self.embeddings),
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in same},
        )
        check_output(self.out, self.resume)
        with console.status("reading model and text", spinner="line"):
            source = compress.load_source(self.model, self.module, self.tokenizer, console)
            source = compress.computed_in(source, self.dtype)
            text = compress.load_text(self.data, source, self.length)
        sinks = self._sinks()
        prepare_output(self.out, self.resume)
        result = compress.run(source, text, self.out, settings, console, sinks)
        _show(result, self.out, console)
        lost = result["relative_accuracy_loss"]
        if bound is not None and lost > bound:
            told = f"lost {100 * lost:.2f} % of the accuracy, --max-loss allows {100 * bound:.2f} %"
            return result | {"failed": f"{told}; the model and its report are in {self.out}"}
        return result

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
