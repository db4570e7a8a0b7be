from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")

class assignable(Generic[T]):
    def __init__(self, get: Callable[[Any], T]) -> None: ...
    @overload
    def __get__(self, machine: None, owner: type) -> assignable[T]: ...
    @overload
    def __get__(self, machine: object, owner: type) -> T: ...
