from collections.abc import Callable
from contextlib import AbstractContextManager

from nsdriver import Driver, Machine, retry

start_all: Callable[[], None]
subtest: Callable[[str], AbstractContextManager[None]]
machines: list[Machine]
driver: Driver
