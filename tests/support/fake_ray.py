"""A stand-in for Ray: actors are objects of this process, and one of them dies at a job on request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any


class RayActorError(Exception):
    """An actor has died."""


class RayTaskError(Exception):
    """A method of an actor has raised ``cause``."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Method:
    """A method of an actor: ``remote`` gives a reference, a function of no arguments, or an iterator of such."""

    def __init__(self, actor: _Handle, name: str) -> None:
        self._actor, self._name, self._streams = actor, name, False

    def options(self, *, num_returns: str) -> _Method:
        self._streams = num_returns == "streaming"
        return self

    def remote(self, *arguments: Any) -> Any:
        return self._stream(*arguments) if self._streams else lambda: self._call(*arguments)

    def _call(self, *arguments: Any) -> Any:
        try:
            return getattr(self._actor.instance, self._name)(*arguments)
        except Exception as error:
            raise RayTaskError(error) from error

    def _stream(self, *arguments: Any) -> Iterator[Callable[[], Any]]:
        for report in self._call(*arguments):
            yield lambda report=report: report
            if self._actor.dies():
                yield self._dead
                return

    def _dead(self) -> Any:
        raise RayActorError


class _Handle:
    def __init__(self, instance: Any, dies: Callable[[], bool]) -> None:
        self.instance, self.dies = instance, dies

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)


class FakeRay:
    """What `sys.modules` has as ``ray``.

    Args:
        gpus: of the cluster.
        deaths: how many actors die, each after the first report of a job.
    """

    def __init__(self, *, gpus: int = 0, deaths: int = 0) -> None:
        self.exceptions = SimpleNamespace(
            RayActorError=RayActorError, RayTaskError=RayTaskError, ObjectLostError=RayActorError
        )
        self._gpus, self.deaths, self.asked, self.started = gpus, deaths, dict[str, Any](), 0

    def init(self, **options: Any) -> None:
        self.asked.update(options)

    def shutdown(self) -> None:
        self.asked["ended"] = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2, "GPU": self._gpus}

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.asked.update(options)
        return lambda kind: SimpleNamespace(remote=lambda *arguments: self._start(kind, *arguments))

    def _start(self, kind: type, *arguments: Any) -> _Handle:
        self.started += 1
        return _Handle(kind(*arguments), self._dies)

    def _dies(self) -> bool:
        self.deaths -= 1
        return self.deaths >= 0

    def wait(self, references: list[Any], *, timeout: float, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Callable[[], Any]) -> Any:
        return reference()

    def kill(self, actor: _Handle) -> None:
        with contextlib.suppress(AttributeError):
            actor.instance._stack.close()
