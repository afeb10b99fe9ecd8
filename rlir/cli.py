"""The ``rlir`` command: picks a command and turns what goes wrong into one clear line."""

import sys
from collections.abc import Sequence

from rlir import __version__, console
from rlir.errors import InputError, TrainingError

USAGE = """\
rlir - reinforcement learning with inverse rewards for action-conditioned video world models

usage: rlir COMMAND ...

  post-train PRESET --out DIR     make a world model obey its actions (the main job)
  evaluate CHECKPOINT             measure action following and video quality
  pretrain STAGE --out DIR        train the models that post-training starts from
  record doom --out DIR           play VizDoom and write clips
  doctor                          what is installed, which backends work, and why others do not;
                                  --parity CHECKPOINT: do rollouts and training agree?

presets: doom-tiny (the demo, minutes), doom (up to an hour), doom-smoke (seconds, for tests)

rlir COMMAND --help says more. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted."""

AGAIN = "the same command goes on, with --resume if it takes that"

COMMANDS = ("post-train", "evaluate", "pretrain", "record", "doctor")


def run(arguments: Sequence[str]) -> int:
    """Run a command line. Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        console.out(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        console.out(f"rlir {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        console.say(f"rlir: the command must be one of {', '.join(COMMANDS)}, got {name!r}")
        return 2
    try:
        from rlir import commands  # imports torch: not for --help
        from rlir.training import InterruptedRun
    except ImportError as error:
        console.say(f"rlir: {error}")
        return 1
    try:
        getattr(commands, f"run_{name.replace('-', '_')}")(arguments[1:])
    except InputError as error:
        console.say(f"rlir {name}: {str(error).removeprefix(f'{name}: ')}")
        return 2
    except TrainingError as error:
        console.say(f"rlir {name}: stopped at {error}")
        return 1
    except OSError as error:
        what = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename else ""
        console.say(f"rlir {name}: {what}{where}; what was saved before is whole: {AGAIN}")
        return 1
    except (InterruptedRun, KeyboardInterrupt):
        console.say(f"rlir {name}: interrupted; {AGAIN}")
        return 130
    return 0


def main() -> None:
    """Console script."""
    sys.exit(run(sys.argv[1:]))
