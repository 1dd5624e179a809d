"""A map like `ordered_map` over a Ray cluster: the one that RAY_ADDRESS names, or one started here."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from mt_core.errors import MtError
from mt_core.plugins import import_library
from mt_data.text_io.ordered_map import DEATHS_ALLOWED, IN_FLIGHT_PER_WORKER

Item = TypeVar("Item")
Result = TypeVar("Result")


def ray_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Generator[Result, None, None]:
    """`function(item)` of every item, in order, on at most `workers` CPUs of the cluster at a time.

    The machines of the cluster read the inputs and the tokenizer's files under the same paths as this one.
    """
    ray = import_library("ray", where="--engine ray", requires=["mt-data[ray]"])
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    call = ray.remote(max_retries=DEATHS_ALLOWED - 1)(_call)
    shared, pending = ray.put(function), deque()
    try:
        for item in items:
            pending.append(call.remote(shared, item))
            if len(pending) > IN_FLIGHT_PER_WORKER * workers:
                yield _get_result(ray, pending.popleft())
        while pending:
            yield _get_result(ray, pending.popleft())
    finally:
        for reference in pending:
            ray.cancel(reference)
        if started:
            ray.shutdown()


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


def _get_result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as err:
        raise err.cause from None
    except ray.exceptions.WorkerCrashedError as err:
        raise MtError(
            "a Ray worker",
            f"was killed, {DEATHS_ALLOWED} times in a row",
            "its machine may be out of memory: run again with fewer --workers",
        ) from err
