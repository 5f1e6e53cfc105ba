"""On-policy distillation, alone or joined with RL: the student samples, the teacher scores, kdloss makes the loss.

  python docs/examples/on_policy_distillation.py --config docs/examples/kdrl.yaml
  python docs/examples/on_policy_distillation.py --config docs/examples/kdrl.yaml mode=grpo actor.optimizer.lr=3e-4
  torchrun --nproc-per-node 8 docs/examples/on_policy_distillation.py --config docs/examples/gsm8k.yaml

A run lies in fileroot/experiment_name/trial_name. Killed at any moment and started again with the same command, it goes
on from its newest checkpoint, and its metrics end as if nothing had happened. Trials of one experiment are compared in
fileroot/experiment_name/reward_curve.png.
"""

import argparse
import os
import sys

import torch
from opd import config as configuration, ranks


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, runs, and prints the table."""
    modes = "\n".join(f"  {name:12} {what}" for name, what in configuration.MODES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"modes:\n{modes}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file; docs/examples/kdrl.yaml explains every key in use")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1, fastest for tiny models)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="replaces a value of the YAML file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        config = configuration.load_config(options.config, options.overrides)
        ranks.start()
        # Imported once the configuration is known to be good, for they take seconds.
        from opd.loop import Run
        from opd.plots import draw, table
        from transformers.utils import logging

        logging.disable_progress_bar()
        Run(config).train(progress=not options.quiet)
    except configuration.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if ranks.rank() == 0:
        experiment = config.run_dir.parent
        print(f"\n{table(experiment)}\n\n{os.path.relpath(draw(experiment))}")
    return 0


if __name__ == "__main__":
    if ranks.launched():
        ranks.leave(main)
    sys.exit(main())
