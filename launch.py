"""Entry point: composes the Hydra config, validates it, plans the stages, and runs them in one Ray session.

    python launch.py                                  # job=all: data, cold start, RL, evaluation
    python launch.py job=data|sft|rl|eval [KEY=VALUE ...]
    python launch.py job=doctor [KEY=VALUE ...]    only checks whether job=all would start
    python launch.py job=watch video=FILE query="..." at=SECONDS model=DIR
    python launch.py --help

Installed, the same command is `sightline` (`sightline.__main__`).

Exit status: 0 done, 1 failed, 2 nothing was started (configuration), or would be (job=doctor), 130 stopped by Ctrl-C,
checkpoint.requeue_status stopped by SIGTERM and ready to go on.

Invariants:
* a bad configuration or missing data stops the run before any actor starts;
* whatever is printed is also in `run_root/logs/driver.log`, as soon as there is a run_root.
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
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.paths import GROUPS, PATH_KEYS, group_options
from conf.sweep import forget_record, sweep_root
from runtime.stop import LOST_STATUS, REQUEUE_STATUS, Requeue, StopSignal
from runtime.tracking.driver_log import DriverLog
from sightline import __version__
from streams.support.files import MODULES_VARIABLE
from streams.support.redact import redact

if TYPE_CHECKING:
    from conf.schema import RunConfig
    from runtime.run import Stage

WATCH_WORDS = ("video", "query", "at", "seconds")

FULL_ERROR = "HYDRA_FULL_ERROR"
"""If this is set to 1, Hydra raises what is wrong with a command line; otherwise it prints a page about it."""
WANTS_FULL_ERROR = FULL_ERROR in os.environ

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as a shell gives it."""

said = DriverLog()


def plain_words(argv: list[str]) -> list[str]:
    """Translate the short words of a command line: `model=FOLDER`, and `video=`, `query=`, `at=` of job=watch.

    A query is free text and is quoted here, since Hydra's grammar would trip over its commas and question marks. A path
    with a `~` is quoted too.
    """
    watching = "job=watch" in argv
    options = set(group_options("model", argv))
    words = []
    for word in argv:
        key, equals, value = word.partition("=")
        if equals and key == "model" and not options.issuperset(value.split(",")):  # a sweep names several
            words.append(f"model.path={_quoted(value)}")
        elif equals and watching and key in WATCH_WORDS:
            words.append(f"watch.{key}={value if key in ('at', 'seconds') else _quoted(value)}")
        elif equals and "~" in value and key in PATH_KEYS and value[0] not in "'\"":
            # Hydra's grammar has no ~ in a plain value, and most shells leave the one in `data.train=~/x` to us.
            words.append(f"{key}={_quoted(value)}")
        else:
            words.append(word)
    return words


def _quoted(text: str) -> str:
    """Quote a text so that Hydra and OmegaConf read it back unchanged.

    They unescape backslashes only before `${`, before quotes and at the end.
    """
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", plain)) + "'"


def start(config: RunConfig, overrides: list[str]) -> None:
    """Plan and run the job's stages. Imports are inside: `--help` and a config error must not wait for torch and Ray."""
    if not config.cluster.existing:
        # Ray reads this as it is imported: a local one then listens on the loopback interface only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Before anything that takes long, so that a wait for the lock or the check of a large checkpoint can be interrupted.
    stop = StopSignal(config.checkpoint.grace_s, config.checkpoint.requeue_status)
    stop.install()
    try:
        _start(config, overrides, stop)
    except Requeue as stopped:
        if stop.loss:
            _end_without_ray(stop, str(stopped))
        print(f"{stopped}; no stage was under way, the same command starts again", file=sys.stderr)
        sys.exit(config.checkpoint.requeue_status)
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C; the same command with resume=auto {stop.goes_on}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:  # named boundary: a stop
        if stop.loss:
            _end_without_ray(stop, str(error))
        if not stop.requested:
            raise
        # A stop that is raised inside a library's native code (most often Ray's) comes out as that library's error.
        print(f"stopped, interrupting {_innermost(error)}; the same command with resume=auto goes on", file=sys.stderr)
        sys.exit(config.checkpoint.requeue_status)


def _end_without_ray(stop: StopSignal, how: str) -> NoReturn:
    print(f"error: {stop.loss}\n{how}\nthe same command with resume=auto {stop.goes_on}", file=sys.stderr)
    said.close()
    # At exit Ray would wait for what is gone; what it leaves behind, `runtime.recovery.reaper` ends.
    os._exit(LOST_STATUS)


def _innermost(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].name if frames else type(error).__name__


def _start(config: RunConfig, overrides: list[str], stop: StopSignal) -> None:
    from runtime.checks import check_inputs, check_memory_policy, content_of
    from runtime.starting_point import StartingPoint
    from runtime.store.manifests import StageStore
    from runtime.store.runlock import RunLock
    from runtime.tracking.progress import Progress

    if config.job.check_only:
        from runtime.doctor.doctor import diagnose

        sys.exit(diagnose(config, overrides, _stages(), stop))
    progress = Progress()
    warn = logging.getLogger("sightline").warning
    with contextlib.ExitStack() as held:
        try:
            start = StartingPoint.of(config)
            rows = check_inputs(config, start)
            config = start.respected(overrides, progress.say, warn)
            check_memory_policy(config, start)
            stages = _stages()
            for name in config.job.stages:
                stages[name].check(config, rows)
            lock = held.enter_context(RunLock(config.root.resolve()))
            said.open(config.root, " ".join(sys.argv))
            store = StageStore(config.root.resolve(), config, progress.say, content_of(rows))
            start.check_nothing_needed_is_replaced(store.plan())
            start.check_cold_start(store.plans)
            from runtime.run import Run

            run = Run(config, start, stages, store, progress, lock, stop, read=rows)
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
            if stop.loss:
                raise
            print(f"{stopped}; the same command with resume=auto goes on from there", file=sys.stderr)
            sys.exit(config.checkpoint.requeue_status)
        except (ValueError, OSError, RuntimeError) as error:
            _fail(config, error, stop)


def _stages() -> dict[str, Stage]:
    """Return the stages of all jobs by name. Imported here: `--help` must not wait for Ray."""
    from evals.stage import EVAL
    from rl.stage import RL
    from runtime.make_data import DATA
    from sft.stage import SFT

    return {"data": DATA, "sft": SFT, "rl": RL, "eval": EVAL}


def _fail(config: RunConfig, error: Exception, stop: StopSignal) -> NoReturn:
    """Print the error, which says what to do, keep the traceback for developers, and exit. Call it in an except block."""
    if stop.requested:
        raise error
    note = _keep_traceback(config.root / "logs" / "driver-error.txt")
    print(f"error: {error}\n{note}\nthe same command with resume=auto {stop.goes_on}", file=sys.stderr)
    sys.exit(1)


def _keep_traceback(path: Path) -> str:
    text = redact(traceback.format_exc())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError:
        return text
    return f"(traceback in {path})"


@hydra.main(version_base="1.3", config_path=str(GROUPS), config_name="config")
def main(raw: DictConfig) -> None:
    from conf.schema import load_config

    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    if hydra_config.mode == RunMode.MULTIRUN:
        said.leave()
        forget_record(hydra_config.sweep.dir)
        raw.run_root = sweep_root(raw.run_root, sys.argv[1:], hydra_config.sweeper.get("params") or {}, overrides)
        print(f"sweep, job {hydra_config.job.num}: {' '.join(overrides)}")
    if not WANTS_FULL_ERROR:
        os.environ.pop(FULL_ERROR, None)  # see command_line
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(raw)
    except (ValueError, OSError) as error:
        # A configuration of the user's own may lack any key.
        _open_log(str(raw.get("run_root")), list(OmegaConf.select(raw, "job.stages", default=[])))
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(2)
    if not config.job.check_only:  # it may be that of a run that is under way
        _open_log(config.run_root, config.job.stages)
    if config.job.stages == ["watch"]:
        from evals.watch.job import watch

        watch(config, overrides)
        return
    start(config, overrides)


def _open_log(run_root: str, stages: list[str]) -> None:
    """Log to a run_root that exists. A new one is created by a run that starts, not by a typing error."""
    said.outlives_readers = stages != ["watch"]
    if said.outlives_readers and Path(run_root).is_dir():
        said.open(Path(run_root), " ".join(sys.argv))


def _stopped_while_loading(signum: int, frame: FrameType | None) -> None:
    """Handle SIGTERM before the configuration is read: there is nothing to write, but the exit status must be right."""
    given = [word.partition("=")[2] for word in sys.argv if word.startswith("checkpoint.requeue_status=")]
    os._exit(int(given[-1]) if given and given[-1].isdigit() else REQUEUE_STATUS)


class _Interrupt:
    """Handles Ctrl-C. It sets `asked`, because a library that is interrupted may turn it into an error of its own."""

    asked = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt


def interruptible(typed: list[str]) -> None:
    """Run `command_line`. Ctrl-C ends it with one line and status 130, a reader that leaves (`| head`) with status 1."""
    interrupt = _Interrupt()
    try:
        # Not where nohup or a shell has switched it off.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, _stopped_while_loading)
        said.install()
        from conf.schema import register_schema

        register_schema()
        sys.argv[1:] = plain_words(typed)
        command_line(typed)
    except BrokenPipeError:
        sys.exit(1)  # as rich does for what it prints
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else None
        if not (interrupt.asked or isinstance(error, KeyboardInterrupt)) or status == INTERRUPTED:
            raise
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        said.close()


def command_line(typed: list[str]) -> None:
    """Run `main`; a command line that Hydra cannot compose ends like any other wrong configuration."""
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


def run(typed: list[str]) -> None:
    """Run the whole program on a command line. A failure ends the process."""
    if "--version" in typed:
        print(f"sightline {__version__}")
        return
    if named := os.environ.get(MODULES_VARIABLE):
        sys.path.insert(1, named)
    interruptible(typed)


if __name__ == "__main__":
    run(sys.argv[1:])
