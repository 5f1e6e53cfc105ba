"""`make demo`: five ways to train the same student, two runs at a time, then one picture and one table.

  python docs/examples/demo.py [--modes distill,grpo,kdrl] [--seeds 1,2,3] [dotted.key=value ...]

Stopped half-way and started again it goes on; finished runs are not repeated.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from opd.checkpoint import read_records
from opd.config import MODES, ConfigError, load_config
from opd.plots import draw, table
from tqdm import tqdm

HERE = Path(__file__).parent
DEFAULT_MODES = "kdrl-full,kdrl,distill,grpo,kdrl-direct"


def main(arguments: list[str] | None = None) -> int:
    """Runs the modes and shows what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=HERE / "cipher.yaml")
    parser.add_argument("--modes", default=DEFAULT_MODES, help=f"of {', '.join(MODES)} (default %(default)s)")
    parser.add_argument(
        "--seeds", default="", help="every mode with each of these seeds (default: the configuration's)"
    )
    parser.add_argument("--at-a-time", type=int, default=2, help="runs side by side, one thread each (default 2)")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="for every run")
    options = parser.parse_intermixed_args(arguments)
    trials = [[f"mode={mode}"] for mode in options.modes.split(",")]
    if options.seeds:
        seeds = options.seeds.split(",")
        trials = [[*trial, f"seed={seed}", f"trial_name=${{mode}}-{seed}"] for trial in trials for seed in seeds]
    try:
        configs = [load_config(options.config, [*options.overrides, *trial]) for trial in trials]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    begin = time.monotonic()
    waiting, running, bars = list(range(len(trials))), {}, {}
    while waiting or running:
        while waiting and len(running) < options.at_a_time:
            i = waiting.pop(0)
            running[i] = start(options.config, [*options.overrides, *trials[i]], configs[i].run_dir)
            steps = configs[i].total_train_steps
            bars[i] = tqdm(total=steps, desc=f"{configs[i].trial_name:12}", position=len(bars), unit="update")
        time.sleep(0.5)
        for i, process in list(running.items()):
            ended = process.poll() is not None  # asked before the file is read, so that the last line is seen
            follow(bars[i], configs[i].run_dir / "metrics.jsonl")
            if ended:
                del running[i]
            if ended and process.returncode:
                for other in running.values():
                    other.terminate()
                told = log_path(configs[i].run_dir).read_text()[-3000:]
                print(f"\n{configs[i].trial_name} failed:\n{told}", file=sys.stderr)
                return 1
    for bar in bars.values():
        bar.close()
    experiment = configs[0].run_dir.parent
    picture = os.path.relpath(draw(experiment))
    print(f"\n{table(experiment)}\n\nThe picture is {picture}, after {time.monotonic() - begin:.0f} s.")
    if options.config == parser.get_default("config") and not options.seeds:
        print(
            "Each mode ran with one seed. README.md has the means of five seeds: "
            'make demo ARGS="--seeds 1,2,3,4,5 experiment_name=five-seeds"'
        )
    return 0


def start(config: Path, overrides: list[str], run_dir: Path) -> subprocess.Popen:
    """One run in a process of its own, with one thread: more are slower on models this small."""
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "on_policy_distillation.py"), "--config", str(config), "--quiet"]
    with log_path(run_dir).open("w") as log:
        return subprocess.Popen(
            [*command, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def follow(bar: tqdm, metrics: Path) -> None:
    """Moves a bar to the last whole line of a metrics file."""
    records = read_records(metrics)
    if not records:
        return
    shown = {name: f"{records[-1][name]:.3f}" for name in ("reward", "reverse_kl") if name in records[-1]}
    scores = [f"{r['accuracy']:.3f}±{r['accuracy_se']:.3f}" for r in records if "accuracy" in r]
    bar.n = records[-1]["step"]
    bar.set_postfix(shown | {"held_out": scores[-1]})


def log_path(run_dir: Path) -> Path:
    """Where a run's own output goes."""
    return run_dir / "log.txt"


if __name__ == "__main__":
    sys.exit(main())
