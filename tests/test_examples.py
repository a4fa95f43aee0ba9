"""Every example, bare and under ``esper-otel run``: the same to the bit, no step missed.

Importing frameworks takes longer than these trainings, so both processes are forked from one
that has them, and a driver runs the examples one after the other, each as ``python -m`` would.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from esper_otel.stream import read_frames
from testkit.fork_server import fork_server
from testkit.torchrun_ranks import torchrun_ranks

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parent.parent
ESPER = [str(Path(sys.executable).with_name("esper-otel")), "run"]
IMPORTED = "lightning", "transformers.trainer"
DRIVER = """
import json, runpy, sys
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    print("example", name, flush=True)
    runpy.run_module(f"examples.{name}", run_name="__main__", alter_sys=True)
"""
STEPS_OF_AN_EPOCH = 22  # of the 1,347 digits that are trained on, in batches of 64
# The first closes the run that all of them share, which goes on all the same.
EXAMPLES = {
    "grow": (["--epochs", "1"], STEPS_OF_AN_EPOCH),
    "digits": (["--epochs", "1", "--save", "digits.pt"], STEPS_OF_AN_EPOCH),
    "characters": (["--steps", "5"], 5),
    "lightning_digits": (["--epochs", "1"], STEPS_OF_AN_EPOCH),
    "finetune": (["--steps", "4"], 4),
}
RANKS = 2


def environment(folder, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "ESPER_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return clean | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "ESPER_MODE": "off",
        "ESPER_SUMMARY": "off",
        "ESPER_RECORDING_DIR": str(folder / "recordings"),
        **{f"OTEL_{signal}_EXPORTER": "none" for signal in ("METRICS", "TRACES", "LOGS")},
        **more,
    }


def output_of(command, folder, **more):
    done = fork_server(*IMPORTED).run(
        command, cwd=folder, env=environment(folder, **more), timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def frames_in(folder):
    """The steps of each recording; an evaluation behind the last one is none."""
    return [
        [frame for frame in read_frames(path) if "nonfinite" in frame.values]
        for path in sorted((folder / "recordings").glob("*.metrics.otlp"))
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each example printed, without us and with us, and the frames recorded of it."""
    pytest.importorskip("lightning")
    pytest.importorskip("transformers")
    folders = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("ours")
    asked = json.dumps([[name, *EXAMPLES[name][0]] for name in EXAMPLES])
    for folder in folders:
        (folder / "driver.py").write_text(DRIVER)
    printed = [
        output_of([*command, "driver.py", asked], folder)
        for command, folder in zip(([sys.executable], ESPER), folders, strict=True)
    ]
    outputs = [
        {name: text for name, _, text in (part.partition("\n") for part in parts)}
        for parts in (output.split("example ")[1:] for output in printed)
    ]
    # Bare but for grow, which records of its own accord.
    assert [len(frames) for frames in frames_in(folders[0])] == [STEPS_OF_AN_EPOCH]
    # Each example is a run of its own; they began one after the other.
    runs_of = sorted(frames_in(folders[1]), key=lambda frames: frames[0].time_unix_nano)
    frames = [frame for one in runs_of for frame in one]
    ends = accumulate((steps for _, steps in EXAMPLES.values()), initial=0)
    recorded = {
        name: frames[start:end]
        for name, (start, end) in zip(EXAMPLES, pairwise(ends), strict=True)
    }
    assert len(frames) == sum(map(len, recorded.values()))
    return *folders, *outputs, recorded


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_the_same_losses_and_weights(runs, example):
    _, _, bare, ours, _ = runs
    assert bare[example].strip()
    assert ours[example] == bare[example]


def test_the_digits_losses_and_weights_are_bit_identical(runs):
    bare, ours = (torch.load(folder / "digits.pt") for folder in runs[:2])
    assert ours["losses"] == bare["losses"]
    assert len(bare["losses"]) == STEPS_OF_AN_EPOCH
    for name, tensor in bare["weights"].items():
        assert torch.equal(tensor, ours["weights"][name])


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_step_of_an_example_is_counted_with_its_loss(runs, example):
    _, _, _, printed, recorded = runs
    frames = recorded[example]
    assert len(frames) == EXAMPLES[example][1]
    steps = [frame.step for frame in frames]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    if "steps, loss" not in printed[example]:
        return
    told = printed[example].rpartition("\n")[0].splitlines()[-1].split()
    assert int(told[0]) == len(frames)
    first, last = float(told[3]), float(told[5].rstrip(","))
    assert [frames[0].values["loss"], frames[-1].values["loss"]] == [first, last]


def output_of_ranks(command, folder):
    with torchrun_ranks(RANKS) as ranks, ThreadPoolExecutor() as threads:
        return "".join(
            threads.map(
                lambda rank: output_of(
                    [*command, "-m", "examples.ddp", "--epochs", "1"], folder, **rank
                ),
                ranks,
            )
        )


def test_two_ranks_print_the_same_losses_and_weights_and_each_is_recorded(tmp_path):
    folders = tmp_path / "bare", tmp_path / "ours"
    for folder in folders:
        folder.mkdir()
    bare = output_of_ranks([sys.executable], folders[0])
    ours = output_of_ranks(ESPER, folders[1])
    assert len(bare.splitlines()) == 2 * RANKS
    assert sorted(ours.splitlines()) == sorted(bare.splitlines())
    assert frames_in(folders[0]) == []
    steps = -(-STEPS_OF_AN_EPOCH // RANKS)
    recorded = frames_in(folders[1])
    assert [[frame.step for frame in frames] for frames in recorded] == [
        list(range(1, steps + 1))
    ] * RANKS
    assert len({frames[0].run for frames in recorded}) == 1
