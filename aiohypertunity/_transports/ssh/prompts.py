"""What a server asks at a log-in: a password, a code."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import asyncssh

from ..._host.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Questions:
    """The server's questions, for somebody who may take their time.

    One that is still open when its log-in is over isn't asked again: the next log-in waits for the answer, and takes
    it. An answer that was given to the server is never used again.
    """

    def __init__(self, prompt: Callable[[str], Any]) -> None:
        self._prompt = prompt
        self._open: tuple[str, asyncio.Future[Any]] | None = None
        self.prefix = ""

    async def ask(self, words: str) -> str:
        """The answer to a question."""
        words = f"{self.prefix}{words}"
        if self._open is None or self._open[0] != words:
            await self.answered()
            self._open = words, self._begin(words)
        answer = self._open[1]
        try:
            return str(await asyncio.shield(answer))
        finally:
            if answer.done():
                self._open = None

    @property
    def is_open(self) -> bool:
        """Whether somebody is still to answer."""
        return self._open is not None and not self._open[1].done()

    def _begin(self, words: str) -> asyncio.Future[Any]:
        if inspect.iscoroutinefunction(self._prompt):
            answering: asyncio.Future[Any] = asyncio.ensure_future(self._prompt(words))
            return answering
        # The process may end though nobody has answered.
        return asyncio.wrap_future(start_thread(self._prompt, words))

    async def answered(self) -> None:
        """Waits until no question is open."""
        if self._open is not None:
            await asyncio.wait([self._open[1]])

    def client(self, gave_secret: Callable[[], None]) -> asyncssh.SSHClient:
        """Has the server's questions answered at a log-in.

        Args:
            gave_secret: Called when the server was given an answer.
        """
        return _Answering(self, gave_secret)

    def close(self) -> None:
        """Asks no more."""
        if self._open is not None:
            self._open[1].cancel()


class _Answering(asyncssh.SSHClient):
    """Hands the server's questions on, each log-in's once: a wrong answer isn't repeated unasked."""

    def __init__(self, questions: Questions, gave_secret: Callable[[], None]) -> None:
        self._questions = questions
        self._gave_secret = gave_secret
        self._asked = False

    async def _answer(self, words: str) -> str:
        answer = await self._questions.ask(words)
        self._gave_secret()
        return answer

    def kbdint_auth_requested(self) -> str | None:
        if self._asked:
            return None
        self._asked = True
        return ""

    async def kbdint_challenge_received(
        self,
        name: str,  # noqa: ARG002 - asyncssh's signature
        instructions: str,  # noqa: ARG002
        lang: str,  # noqa: ARG002
        prompts: Sequence[tuple[str, bool]],
    ) -> list[str]:
        return [await self._answer(words) for words, _ in prompts]

    async def password_auth_requested(self) -> str | None:
        if self._asked:
            return None
        self._asked = True
        return await self._answer("Password: ")
