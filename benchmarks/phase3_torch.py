"""A "Phase 3" network (TRM x Titans-MAG) in PyTorch: the arithmetic ours is timed and checked with.

    python -m benchmarks.phase3_torch --batch 8 --length 256 --threads 2

Written from the equations as plain eager PyTorch: a loop over tokens in the long-term memory, a
loop over steps, scores with an explicit band mask. Keys and shapes are the reference's. Memory is
passed in and returned, where the reference keeps it between calls; there is no dropout.
"""

import collections
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a pair's JSON, under its names for them; the production model's values."""

    d_model: int = 320
    n_layers: int = 8
    n_heads: int = 5
    d_ff: int = 1280
    vocab_size: int = 50257
    max_seq_len: int = 2048
    sw_window: int = 1024
    d_mem: int = 160
    memory_decay: float = 0.99
    mag_hidden: int = 160
    mag_entropy_reg: float = 0.001
    T_max: int = 3
    micro_steps: int = 2
    step_weights: tuple[float, ...] = (0.33, 0.5, 0.75, 1.0)
    detach_between_steps: bool = True
    halt_threshold: float = 0.95
    act_loss_weight: float = 0.01

    @classmethod
    def from_json(cls, config: dict) -> "Config":
        """From the JSON's `config`; what the forward pass does not use is dropped."""
        parts = [config[f"{name}_config"] for name in ("titans", "trm", "act")]
        known = {f.name for f in dataclasses.fields(cls)}
        flat = {k: v for part in parts for k, v in part.items() if k in known}
        return cls(**flat | {"step_weights": tuple(flat["step_weights"])})

    def to_json(self) -> dict:
        """The three parts `from_json` reads."""
        flat = list(dataclasses.asdict(self).items())  # 11 of Titans, 4 of TRM, 2 of ACT
        titans, trm, act = dict(flat[:11]), dict(flat[11:15]), dict(flat[15:])
        titans["head_dim"] = self.d_model // self.n_heads
        return {"titans_config": titans, "trm_config": trm, "act_config": act}


class RMSNorm(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class SlidingWindowAttention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.n_heads, self.reach = c.n_heads, c.sw_window // 2
        square = lambda: nn.Linear(c.d_model, c.d_model, bias=False)
        self.w_q, self.w_k, self.w_v, self.w_o = square(), square(), square(), square()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, d = x.shape
        split = lambda a: a.view(batch, length, self.n_heads, d // self.n_heads).transpose(1, 2)
        q, k, v = split(self.w_q(x)), split(self.w_k(x)), split(self.w_v(x))
        scores = q @ k.transpose(-2, -1) / (d // self.n_heads) ** 0.5
        i = torch.arange(length, device=x.device)
        band = (i[:, None] - i[None, :]).abs() <= self.reach
        scores = scores.masked_fill(~band, float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(mask == 0, float("-inf"))
        weights = torch.nan_to_num(F.softmax(scores, dim=-1), nan=0.0)  # nan: a row without keys
        return self.w_o((weights @ v).transpose(1, 2).reshape(batch, length, d))


class SwiGLU(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.w_gate = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.w_up = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.w_down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class TitansLayer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attention = RMSNorm(c.d_model), SlidingWindowAttention(c)
        self.norm2, self.mlp = RMSNorm(c.d_model), SwiGLU(c)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class LongTermMemory(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.decay = c.memory_decay
        self.w_down = nn.Linear(c.d_model, c.d_mem, bias=False)
        self.w_up = nn.Linear(c.d_mem, c.d_model, bias=False)
        self.register_buffer("memory_state", torch.zeros(1, 1, c.d_mem))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is recalled at each token, and the state (1, 1, d_mem) for a next call."""
        compressed = self.w_down(x)
        state = (self.memory_state if state is None else state).expand(len(x), -1, -1)
        states = []
        for t in range(x.shape[1]):
            state = self.decay * state + (1 - self.decay) * compressed[:, t : t + 1]
            states.append(state)
        return self.w_up(torch.cat(states, dim=1)), state.mean(0, keepdim=True).detach()


class MAGGate(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.entropy_reg = c.mag_entropy_reg
        self.w_concat = nn.Linear(2 * c.d_model, c.mag_hidden)
        self.w_gate = nn.Linear(c.mag_hidden, c.d_model)

    def forward(self, y: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        g = torch.sigmoid(self.w_gate(F.relu(self.w_concat(torch.cat([y, m], dim=-1)))))
        entropy = -(g * torch.log(g + 1e-8) + (1 - g) * torch.log(1 - g + 1e-8))
        return g * y + (1 - g) * m, -self.entropy_reg * entropy.mean()


class TitansMAGBackbone(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.token_emb = nn.Embedding(c.vocab_size, c.d_model)
        self.pos_emb = nn.Embedding(c.max_seq_len, c.d_model)
        self.layers = nn.ModuleList(TitansLayer(c) for _ in range(c.n_layers))
        self.ltm, self.mag_gate, self.norm = LongTermMemory(c), MAGGate(c), RMSNorm(c.d_model)

    def forward(self, input_ids: Tensor, memory_state=None, mask=None):
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_emb(input_ids) + self.pos_emb(positions)
        for layer in self.layers:
            x = layer(x, mask)
        y = self.norm(x)
        recalled, memory_state = self.ltm(y, memory_state)
        features, loss_gate = self.mag_gate(y, recalled)
        return features, loss_gate, memory_state


def mlp(parts: int, d: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(parts * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))


class LatentRefiner(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.feature_attn = nn.MultiheadAttention(d, 8, batch_first=True)  # 8 whatever n_heads is
        self.answer_attn = nn.MultiheadAttention(d, 8, batch_first=True)
        self.mlp, self.norm = mlp(3, d), nn.LayerNorm(d)

    def forward(self, features: Tensor, y: Tensor, z: Tensor) -> Tensor:
        a, _ = self.feature_attn(z, features, features)
        b, _ = self.answer_attn(z, y, y)
        return self.norm(z + self.mlp(torch.cat([z, a, b], dim=-1)))


class AnswerUpdater(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.mlp, self.norm = mlp(2, d), nn.LayerNorm(d)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return self.norm(y + self.mlp(torch.cat([y, z], dim=-1)))


class TRM(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.steps, self.micro_steps, self.detach = c.T_max, c.micro_steps, c.detach_between_steps
        self.refiner, self.updater = LatentRefiner(c.d_model), AnswerUpdater(c.d_model)
        self.z0_proj, self.y0_proj = (nn.Linear(c.d_model, c.d_model) for _ in range(2))

    def forward(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Answers y and latents z, the initial ones first; a step's gradient stays in the step.

        Only the first step's, and the initial ones', reaches the features.
        """
        z = self.z0_proj(features)
        y = self.y0_proj(z)
        all_y, all_z = [y], [z]
        for step in range(self.steps):
            if self.detach and step > 0:
                features, y, z = features.detach(), y.detach(), z.detach()
            for _ in range(self.micro_steps):
                z = self.refiner(features, y, z)
            y = self.updater(y, z)
            all_y.append(y)
            all_z.append(z)
        return all_y, all_z


class ACTHead(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.w_halt = nn.Linear(c.d_model, 1)
        self.register_buffer("ema_step_acc", torch.zeros(10))  # both unused in the forward pass
        self.register_buffer("step_count", torch.zeros(10))

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.w_halt(z)).mean(dim=(1, 2))


class TRMTitansMAGModel(nn.Module):
    def __init__(self, config: Config | None = None, seed: int = 0):
        super().__init__()
        self.config = c = config or Config()
        self.backbone, self.trm, self.act_head = TitansMAGBackbone(c), TRM(c), ACTHead(c)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.lm_head.weight = self.backbone.token_emb.weight
        self.initialise(seed)

    def initialise(self, seed: int) -> None:
        """Backbone N(0, 0.02), its biases 0; TRM and ACT as torch has them; gains 1, buffers 0."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for module in reversed([*self.trm.modules(), *self.act_head.modules()]):
                if isinstance(module, nn.MultiheadAttention):
                    module._reset_parameters()  # after its out_proj, whose bias it sets to 0
                elif hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            for name, x in self.backbone.named_parameters():
                x.normal_(0, 0.02) if x.ndim == 2 else x.fill_("norm" in name)
            for x in self.buffers():
                x.zero_()

    def forward(self, input_ids, memory_state=None, mask=None, labels=None, all_steps=False):
        """A dict of results; with neither `labels` nor `all_steps`, the last step's logits only.

        Without `memory_state` memory starts from the buffer. Halting stops nothing.
        """
        input_ids, c = input_ids[:, : self.config.max_seq_len], self.config
        features, loss_gate, memory_state = self.backbone(input_ids, memory_state, mask)
        all_y, all_z = self.trm(features)
        halt_probs = [self.act_head(z) for z in all_z]
        halted = torch.stack(halt_probs) > c.halt_threshold
        halting_steps = torch.where(halted.any(0), halted.int().argmax(0) + 1, len(all_z))
        wanted = all_y if all_steps or labels is not None else all_y[-1:]
        all_logits = [self.lm_head(y) for y in wanted]
        out = {"logits": all_logits[-1], "all_logits": all_logits, "all_y": all_y, "all_z": all_z}
        out |= {"halt_probs": halt_probs, "halting_steps": halting_steps, "features": features}
        out |= {"memory_state": memory_state, "loss_gate": loss_gate}
        if labels is not None:
            losses = [F.cross_entropy(x.flatten(0, 1), labels.flatten()) for x in all_logits]
            weighted = [w * x for w, x in zip(c.step_weights, losses, strict=True)]
            ce = sum(weighted) / sum(c.step_weights)
            act = c.act_loss_weight * halting_steps.float().mean()
            out |= {"loss": ce + act + loss_gate, "loss_ce": ce, "loss_act": act}
            out["step_losses"] = losses
        return out


def from_tensors(config: Config, tensors: dict[str, Tensor]) -> TRMTitansMAGModel:
    """A model in eval mode; its vocabulary is the table's, its head tied where there is none."""
    table = tensors["backbone.token_emb.weight"]
    model = TRMTitansMAGModel(dataclasses.replace(config, vocab_size=len(table)))
    if "lm_head.weight" in tensors:
        model.lm_head.weight = nn.Parameter(torch.empty_like(tensors["lm_head.weight"]))
    model.load_state_dict({"lm_head.weight": table, **tensors})
    return model.eval()


def load_pair(path: str | Path) -> TRMTitansMAGModel:
    """The model of `<path>.safetensors` and `<path>.json`."""
    config = Config.from_json(json.loads(Path(f"{path}.json").read_text())["config"])
    return from_tensors(config, load_file(f"{path}.safetensors"))


def save_pair(model: TRMTitansMAGModel, path: str | Path, metadata: dict | None = None) -> None:
    """Write `<path>.safetensors` and `<path>.json`, float32, a tied head left out."""
    tensors = {k: v.float().contiguous() for k, v in model.state_dict().items()}
    if model.lm_head.weight is model.backbone.token_emb.weight:
        del tensors["lm_head.weight"]
    save_file(tensors, f"{path}.safetensors")
    about = {"config": model.config.to_json(), "metadata": metadata or {"phase": 3}}
    about |= {"has_optimizer": False, "has_extra_tensors": False, "extra_tensor_keys": []}
    Path(f"{path}.json").write_text(json.dumps(about, indent=2) + "\n")


def main(batch: int = 8, length: int = 256, repeats: int = 5, threads: int = 0) -> float:
    """Median seconds of the production model's forward pass, and the parts' shares; printed.

    Worth nothing on a busy machine: threads that wait for each other were seen to take 7 times as
    long. The load is printed for that.

    Args:
      batch: sequences.
      length: tokens of each.
      repeats: passes timed, after one that is not; as many again, with a clock on the parts.
      threads: torch's threads; 0 leaves its own choice.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    model, ids = TRMTitansMAGModel().eval(), torch.randint(50257, (batch, length))
    b, now, spent = model.backbone, time.perf_counter, collections.Counter()
    parts = {b.token_emb: "embedding", b.pos_emb: "embedding", **dict.fromkeys(b.layers, "layers")}
    parts |= {b.ltm: "memory", b.mag_gate: "gate", model.trm: "TRM"}
    parts |= {model.act_head: "ACT", model.lm_head: "head"}

    def timed() -> float:
        start = now()
        model(ids)
        return now() - start

    with torch.inference_mode():
        timed()
        passes, load = [timed() for _ in range(repeats)], os.getloadavg()[0]
        for module, name in parts.items():  # no part is inside another
            begin = lambda *_, name=name: spent.update({name: -now()})
            end = lambda *_, name=name: spent.update({name: now()})
            module.register_forward_pre_hook(begin)
            module.register_forward_hook(end)
        whole = sum(timed() for _ in range(repeats))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, ", end="")
    seconds = statistics.median(passes)
    print(f"{batch} x {length} tokens: median {seconds:.3f} s, ", end="")
    print(f"{min(passes):.3f} to {max(passes):.3f}; load {load:.1f} on {os.cpu_count()} cores")
    shares = {name: x / whole for name, x in spent.items()}
    shares["rest"] = 1 - sum(shares.values())
    print(", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    return seconds


if __name__ == "__main__":
    tyro.cli(main)
