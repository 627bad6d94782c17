import json
import sys
import types

import pytest

from bitnet_jax import BitnetError
from bitnet_jax.train import sinks

ENTRIES = [
    {"stage": "train", "step": 1, "epoch": 1, "loss": 2.5, "tokens_per_second": 100},
    {"stage": "train", "step": 2, "epoch": 1, "loss": 1.5, "tokens_per_second": 110},
    {"stage": "train", "step": 2, "epoch": 1, "held_out_loss": 1.75, "held_out_accuracy": 0.5},
    {"stage": "tune", "step": 1, "epoch": 1, "loss": 3.5, "tokens_per_second": 120},
]


def test_jsonl_appends_a_line_an_entry(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"old": 1}\n')
    sink = sinks.jsonl(path)
    for i, entry in enumerate(ENTRIES, start=2):
        sink(entry)
        assert len(path.read_text().splitlines()) == i  # there at once, not when closed
    assert [json.loads(x) for x in path.read_text().splitlines()] == [{"old": 1}, *ENTRIES]


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(BitnetError, match=r"log\.jsonl: cannot be written \(No such file"):
        sinks.jsonl(tmp_path / "missing" / "log.jsonl")(ENTRIES[0])


def scalars(folder):
    """What TensorBoard would draw: {tag: [(step, value)]}, from the event files themselves."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            data = data[12 + size + 4 :]
    return found


def test_tensorboard_files_hold_every_number(tmp_path):
    sink = sinks.tensorboard(tmp_path / "runs")
    for entry in ENTRIES:
        sink(entry)
    sink.close()
    assert scalars(tmp_path / "runs") == {
        "train/loss": [(1, 2.5), (2, 1.5)],
        "train/tokens_per_second": [(1, 100.0), (2, 110.0)],
        "train/held_out_loss": [(2, 1.75)],
        "train/held_out_accuracy": [(2, 0.5)],
        "tune/loss": [(1, 3.5)],
        "tune/tokens_per_second": [(1, 120.0)],
    }


class Wandb(types.ModuleType):
    """Stands in for wandb: the three calls the sink makes, with the names wandb gives them."""

    def __init__(self):
        super().__init__("wandb")
        self.settings, self.logged, self.axes, self.finished = None, [], {}, 0

    def init(self, *, project, **settings):
        self.settings = {"project": project, **settings}
        return self

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, data):
        self.logged.append(data)

    def finish(self):
        self.finished += 1


def test_wandb_gets_every_number_on_an_axis_of_its_stage(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    sink = sinks.wandb("ternary", mode="offline", name="first")
    for entry in ENTRIES:
        sink(entry)
    sink.close()
    assert module.settings == {"project": "ternary", "mode": "offline", "name": "first"}
    assert module.axes == {"train/*": "train/step", "tune/*": "tune/step"}
    assert module.logged[1:3] == [
        {"train/step": 2, "train/loss": 1.5, "train/tokens_per_second": 110},
        {"train/step": 2, "train/held_out_loss": 1.75, "train/held_out_accuracy": 0.5},
    ]
    assert len(module.logged) == 4 and module.finished == 1


@pytest.mark.parametrize(
    ("module", "make"),
    [("tensorboardX", lambda: sinks.tensorboard("runs")), ("wandb", lambda: sinks.wandb("x"))],
)
def test_a_missing_package_is_told_with_what_to_install(monkeypatch, module, make):
    monkeypatch.setitem(sys.modules, module, None)
    extra = module.lower().removesuffix("x")
    with pytest.raises(BitnetError, match=rf"pip install 'bitnet-jax\[{extra}\]'"):
        make()
