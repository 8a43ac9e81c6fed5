"""Runs the variants, in a child process where a kernel may crash or hang.

A bad kernel can raise, give wrong numbers, end the process or never end. Each is a failure of
that kernel and variant, and the others still run, in a new process.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..kernels.backend import select_backend
from ..kernels.trust import unchecked
from .checks import Outcome, run_variant
from .timing import time_variant
from .variants import Variant

# a job that has not ended after this is stopped
SECONDS_A_JOB = 120
# a job that failed in so many variants is not run in the rest
MOST_FAILURES = 3
LAST_LINES = 12


def results(
    variants: list[Variant], backend: str, progress: Callable[[str], None], *, times: bool,
    isolated: bool,
) -> list[dict]:  # fmt: skip
    """One record a variant: its jobs' outcomes, and its times if all went well.

    Args:
        progress: called with a line on what runs.
        isolated: whether the kernels run in a child process.
    """
    found: list[dict] = []
    failures: Counter[str] = Counter()
    while len(found) < len(variants):
        skip = frozenset(job for job, n in failures.items() if n >= MOST_FAILURES)
        rest = variants[len(found) :]
        source = _child_events if isolated else _events
        before = len(found)
        for event in source(rest, backend, skip, times):
            if event["event"] == "job":
                name = f"[{len(found) + 1}/{len(variants)}] {variants[len(found)]}"
                progress(f"{name}: {event['job']}")
                continue
            record = event["record"]
            found.append(record)
            failures.update(job for job, o in record["jobs"].items() if o["message"])
            progress(f"[{len(found)}/{len(variants)}] {record['variant']}: {_words(record)}")
            if any(o["message"] for o in record["jobs"].values()):
                break  # a GPU may be in no state to go on; `skip` may have changed
        if len(found) == before:
            raise RuntimeError("The kernels' process ended without saying anything.")
    return found


def _words(record: dict) -> str:
    wrong = [job for job, outcome in record["jobs"].items() if outcome["message"]]
    return "FAILED " + ", ".join(wrong) if wrong else "ok"


def _events(
    variants: list[Variant], backend: str, skip: frozenset[str], times: bool
) -> Iterator[dict]:
    """Runs the variants here: an event before each job, and one with each variant's record."""
    implementation = select_backend(backend)
    with unchecked():  # these checks say more
        for variant in variants:
            jobs: dict[str, dict] = {}
            for job, outcome in run_variant(variant, implementation, skip):
                if outcome is None:
                    yield {"event": "job", "job": job}
                else:
                    jobs[job] = _as_json(outcome)
            measured = None
            if times and not skip and all(o["message"] is None for o in jobs.values()):
                yield {"event": "job", "job": "times"}
                try:
                    measured = time_variant(variant, implementation)
                except Exception as error:  # larger shapes than those of the checks
                    jobs["times"] = _failed(f"{type(error).__name__}: {error}")
            yield _variant_event(variant, jobs, measured)


def _child_events(
    variants: list[Variant], backend: str, skip: frozenset[str], times: bool
) -> Iterator[dict]:
    """The events of a child process; if it dies, a failure of the job that it was running."""
    order = {"variants": [v.as_json() for v in variants], "backend": backend}
    order |= {"skip": sorted(skip), "times": times}
    child = _start_child()
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr), daemon=True)
    reader.start()
    done, job, late, ended = 0, "pack", threading.Event(), False

    def stop() -> None:
        late.set()
        child.kill()

    timer = _timer(stop)
    try:
        child.stdin.write(json.dumps(order))
        child.stdin.close()
        for line in child.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # something that a library printed
            timer.cancel()
            timer = _timer(stop)
            done += event["event"] == "variant"
            job = event.get("job", "pack")
            yield event
        ended = True
    except BrokenPipeError:
        ended = True  # it died before it had read its order
    finally:
        timer.cancel()
        if not ended:  # the caller needs no more events
            child.kill()
        child.stdout.close()
        code = child.wait()
        reader.join()
    if done < len(variants):
        how = (
            f"no end after {SECONDS_A_JOB} s" if late.is_set() else f"the process ended with {code}"
        )
        message = "\n".join([how, *"".join(errors).splitlines()[-LAST_LINES:]])
        yield _variant_event(variants[done], {job: _failed(message)})


def _start_child() -> Any:
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import child; child()"],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def _timer(stop: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(SECONDS_A_JOB, stop)
    timer.daemon = True
    timer.start()
    return timer


def _variant_event(variant: Variant, jobs: dict[str, dict], times: dict | None = None) -> dict:
    record = {"variant": str(variant), **variant.as_json(), "jobs": jobs, "times": times}
    return {"event": "variant", "record": record}


def _failed(message: str) -> dict:
    return {"error": None, "message": message, "seconds": 0.0}


def _as_json(outcome: Outcome) -> dict:
    error = None if math.isnan(outcome.error) else outcome.error
    return {"error": error, "message": outcome.message, "seconds": round(outcome.seconds, 3)}


def child() -> None:
    """The child process: reads its order from stdin, prints one event a line."""
    order = json.load(sys.stdin)
    variants = [Variant(**fields) for fields in order["variants"]]
    for event in _events(variants, order["backend"], frozenset(order["skip"]), order["times"]):
        print(json.dumps(event), flush=True)
