"""Entry point: composes the Hydra config, validates it, plans the stages, and runs them in one Ray session.

    python launch.py                                  # job=all: data, cold start, RL, evaluation
    python launch.py job=data|sft|rl|eval [KEY=VALUE ...]
    python launch.py job=watch video=FILE query="..." at=SECONDS model=DIR
    python launch.py --help

Owner: launch. Invariant: a bad configuration or missing data stops before any actor starts. Exit status: 0 done,
1 failed, 2 nothing was started (configuration), checkpoint.requeue_status stopped by SIGTERM and ready to go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rl.stop import REQUEUE_STATUS, Requeue, StopSignal
from streams.terminal import escape_unprintable_output

if TYPE_CHECKING:
    from conf.schema import RunConfig

WATCH_WORDS = ("video", "query", "at", "seconds")

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Set to 1, Hydra raises what is wrong with a command line; otherwise it prints a page about it."""
WANTS_FULL_ERROR = FULL_ERROR in os.environ


def plain_words(argv: list[str]) -> list[str]:
    """Command-line words that read better than their keys: `model=FOLDER`, and `video=`, `query=`, `at=` of job=watch.

    A query is free text: it is quoted here, as Hydra's grammar would trip over its commas and question marks.
    """
    watching = "job=watch" in argv
    options = {path.stem for path in (Path(__file__).parent / "conf" / "model").glob("*.yaml")}
    words = []
    for word in argv:
        key, equals, value = word.partition("=")
        if equals and key == "model" and value not in options:
            words.append(f"model.path={_quoted(value)}")
        elif equals and watching and key in WATCH_WORDS:
            words.append(f"watch.{key}={value if key in ('at', 'seconds') else _quoted(value)}")
        else:
            words.append(word)
    return words


def _quoted(text: str) -> str:
    """The text as Hydra and OmegaConf read it back unchanged: backslashes count only before `${`, quotes and the end."""
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", plain)) + "'"


def start(config: RunConfig, overrides: list[str]) -> None:
    """Plan and run. Imports what it needs here: `--help` and a config error must not wait for torch and Ray."""
    # Before anything that takes long: a wait for the lock, the check of a large checkpoint, may be interrupted, too.
    stop = StopSignal(config.checkpoint.grace_s, config.checkpoint.requeue_status)
    stop.install()
    try:
        _start(config, overrides, stop)
    except Requeue as stopped:
        print(f"{stopped}; no stage was under way, the same command starts again", file=sys.stderr)
        sys.exit(config.checkpoint.requeue_status)
    except Exception as error:  # named boundary: a stop
        if not stop.requested:
            raise
        # Raised inside a library's native code (Ray's, most often), a stop comes out as an error of that library.
        print(f"stopped, interrupting {_innermost(error)}; the same command with resume=auto goes on", file=sys.stderr)
        sys.exit(config.checkpoint.requeue_status)


def _innermost(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].name if frames else type(error).__name__


def _start(config: RunConfig, overrides: list[str], stop: StopSignal) -> None:
    from rl.checks import (
        check_cold_start,
        check_memory,
        check_nothing_needed_is_replaced,
        preflight,
        respect_checkpoint,
    )
    from rl.runlock import RunLock
    from rl.stages import StageStore
    from rl.tracking import Progress

    progress = Progress()
    warn = logging.getLogger("sightline").warning
    with contextlib.ExitStack() as held:
        try:
            preflight(config)
            config = respect_checkpoint(config, overrides, progress.say, warn)
            check_memory(config)
            lock = held.enter_context(RunLock(config.root.resolve()))
            store = StageStore(config.root.resolve(), config, progress.say)
            check_nothing_needed_is_replaced(config, store.plan())
            check_cold_start(config, store.plans)
            from rl.run import Run

            run = Run(config, store, progress, lock, stop)
        except (
            ValueError,
            OSError,
        ) as error:  # a missing file, a full disk, a wait for Ray (TimeoutError is an OSError)
            print(f"configuration error: {error}", file=sys.stderr)
            sys.exit(2)
        except RuntimeError as error:  # Ray, or an actor's process, did not start
            _fail(config, error, stop)
        try:
            run.run()
        except Requeue as stopped:
            print(f"{stopped}; the same command with resume=auto goes on from there", file=sys.stderr)
            sys.exit(config.checkpoint.requeue_status)
        except (ValueError, OSError, RuntimeError) as error:
            _fail(config, error, stop)


def _fail(config: RunConfig, error: Exception, stop: StopSignal) -> NoReturn:
    """The error says by itself what to do; the traceback is for whoever mends the program. To be called where it is caught."""
    if stop.requested:
        raise error
    note = _keep_traceback(config.root / "logs" / "driver-error.txt")
    print(f"error: {error}\n{note}", file=sys.stderr)
    sys.exit(1)


def _keep_traceback(path: Path) -> str:
    text = traceback.format_exc()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError:
        return text
    return f"(traceback in {path})"


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(raw: DictConfig) -> None:
    from conf.schema import load_config

    if not WANTS_FULL_ERROR:
        os.environ.pop(FULL_ERROR, None)  # see command_line
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(raw)
    except (ValueError, OSError) as error:
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(2)
    overrides = list(HydraConfig.get().overrides.task)
    if config.job.stages == ["watch"]:
        from evals.watch import watch

        watch(config, overrides)
        return
    start(config, overrides)


def _stopped_while_loading(signum: int, frame: FrameType | None) -> None:
    """SIGTERM before the configuration is read: there is nothing to write, and the status must be right all the same."""
    given = [word.partition("=")[2] for word in sys.argv if word.startswith("checkpoint.requeue_status=")]
    os._exit(int(given[-1]) if given and given[-1].isdigit() else REQUEUE_STATUS)


def register_schema() -> None:
    """The typed defaults of every key, for Hydra."""
    from conf.schema import RunConfig

    ConfigStore.instance().store(name="schema", node=OmegaConf.to_container(OmegaConf.structured(RunConfig)))


def command_line(typed: list[str]) -> None:
    """`main`; a command line that Hydra cannot compose ends as any other wrong configuration."""
    if WANTS_FULL_ERROR:
        main()
        return
    os.environ[FULL_ERROR] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        # Before `main` is entered: inside it, everything is caught where it belongs.
        from conf.mistakes import explain

        print(f"configuration error: {explain(error, typed)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped_while_loading)
    escape_unprintable_output()
    register_schema()
    typed = sys.argv[1:]
    sys.argv[1:] = plain_words(typed)
    command_line(typed)
