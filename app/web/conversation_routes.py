"""The routes of conversations: a WebSocket to play through, and MIDI files."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from app.web.conversation import Conversation
from app.web.conversations import Bucket, Conversations
from app.web.limits import Refusal, read_body
from app.web.log import LOG
from app.web.passwords import CLIENT_ADDRESS
from app.web.settings import WebError, in_words
from app.web.timeline import Refused, Timeline
from music_ar import MidiError

_MAX_SMALL_BYTES = 64 * 2**10  # of messages that hold no timeline
_EVENTS, _EVENTS_PER_S = 3000, 100.0
_COST = {"answer": 20, "silence": 5, "replace": 50}  # as many events; each makes the model work
_REFUSED_AGAIN_S = 1.0  # a flood of events is refused in few words
_OPEN_WITHIN_S = 30.0
_MOST_UNSENT = 2000  # messages to a client that does not read them
NOT_OPENED, TAKEN_OVER, POLICY, TRY_LATER = 4000, 4001, 1008, 1013


class ConversationRoutes(Router):
    """An ASGI app for `/conversation` and below.

    Args:
        conversations: of the server.
    """

    def __init__(self, conversations: Conversations):
        self._conversations = conversations
        super().__init__(
            [
                WebSocketRoute("/conversation", self._serve),
                Route("/conversation", self._file_of_a_timeline, methods=["POST"]),
                Route("/conversation/{name}.mid", self._file_of_a_session, methods=["GET"]),
            ]
        )

    async def _serve(self, socket: WebSocket) -> None:
        address = CLIENT_ADDRESS.get()
        await socket.accept()
        try:
            with self._conversations.connected(address):
                await _Connection(self._conversations, socket, address).serve()
        except Refusal as refusal:
            await socket.close(TRY_LATER if refusal.status == 503 else POLICY, refusal.reason)

    async def _file_of_a_session(self, request: Request) -> Response:
        conversation = self._conversations.of(request.path_params["name"])
        if conversation is None:
            raise Refusal(404, "the server no longer has this conversation; open it again")
        return _file(conversation.timeline.copied().midi)

    async def _file_of_a_timeline(self, request: Request) -> Response:
        values = read_body(await request.body())
        return _file(lambda: Timeline.read(values.get("timeline")).midi())


def _file(midi: Callable[[], bytes]) -> Response:
    try:
        content = midi()
    except (WebError, MidiError) as error:
        raise Refusal(400, str(error)) from error
    return Response(
        content, media_type="audio/midi", headers={"content-disposition": 'attachment; filename="duet.mid"'}
    )


class _Connection:
    """One client of a conversation.

    Args:
        conversations: of the server.
        socket: accepted.
        address: of the client.
    """

    def __init__(self, conversations: Conversations, socket: WebSocket, address: str):
        self._conversations, self._socket, self._address = conversations, socket, address
        self._unsent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._allowance = Bucket(_EVENTS, _EVENTS_PER_S)
        self._closing: asyncio.Task[None] | None = None
        self._refused_s = -_REFUSED_AGAIN_S  # when events were last refused, by the monotonic clock

    async def serve(self) -> None:
        """Take messages until the client leaves, or another takes its place."""
        sending = asyncio.create_task(self._send())
        conversation = None
        try:
            conversation = await self._opened()
            while conversation is not None:
                await self._take(conversation, await self._socket.receive_text())
        except (WebSocketDisconnect, KeyError, RuntimeError):  # it left; it sent bytes; it was closed from here
            pass
        finally:
            sending.cancel()
            if conversation is not None and conversation.post == self._post:
                conversation.post, conversation.leave, conversation.left_s = None, None, time.monotonic()
                conversation.stop("lost")

    async def _opened(self) -> Conversation | None:
        """Take the first message; None, and the connection is closed, if it opens nothing."""
        try:
            async with asyncio.timeout(_OPEN_WITHIN_S):
                text = await self._socket.receive_text()
            self._conversations.check_timeline(self._address, len(text))
            values = _read(text)
            if values.get("type") != "open":
                raise Refused(
                    "message", f"the first message must be of type “open”, got {in_words(values.get('type'))}"
                )
            conversation, resumed = self._conversations.open(values)
        except TimeoutError:
            await self._close(NOT_OPENED, "no conversation was opened")
            return None
        except Refused as error:
            await self._close(TRY_LATER if error.code in ("busy", "rate", "stopping") else NOT_OPENED, str(error))
            return None
        except WebError as error:
            await self._close(NOT_OPENED, str(error))
            return None
        if conversation.leave is not None:
            await conversation.leave(TAKEN_OVER, "This conversation goes on in another tab or window.")
        conversation.post, conversation.leave = self._post, self._close
        known = {"timeline": conversation.timeline.flat()} if values.get("timeline") is None else {}
        self._post(
            {"type": "ready", "session": conversation.name, "resumed": resumed, "latents": conversation.latents}
            | {"answers": conversation.answers}
            | known
        )
        return conversation

    async def _take(self, conversation: Conversation, text: str) -> None:
        try:
            is_large = len(text) > _MAX_SMALL_BYTES
            if is_large:  # counted before it is read, which takes time too
                self._conversations.check_timeline(self._address, len(text))
            values = _read(text)
            kind = values.get("type")
            if kind == "replace" and not is_large:
                self._conversations.check_timeline(self._address, len(text))
            if kind != "replace" and is_large:
                raise Refused("message", f"a message of this type may have at most {_MAX_SMALL_BYTES // 2**10} kB")
            events = values.get("events")
            cost = _COST.get(kind if isinstance(kind, str) else "", 1)
            if not self._allowance.take(max(cost, len(events) if isinstance(events, list) else 1)):
                raise Refused(
                    "rate",
                    f"more than {_EVENTS:,} events at once, or {_EVENTS_PER_S:g} a second for long, are not taken: "
                    "check the keyboard and its cable; what it sent last is left out",
                )
            self._do(conversation, kind, values)
        except Refused as error:
            now_s = time.monotonic()
            if error.code != "rate" or now_s >= self._refused_s + _REFUSED_AGAIN_S:
                self._post({"type": "error", "code": error.code, "message": str(error)})
                self._refused_s = now_s
        except WebError as error:
            self._post({"type": "error", "code": "message", "message": str(error)})
        except Exception:
            LOG.exception("a fault in a conversation")
            self._post({"type": "error", "code": "failed", "message": "the server made a mistake; its log has more"})

    def _do(self, conversation: Conversation, kind: object, values: dict[str, Any]) -> None:
        if kind == "play":
            conversation.play(values.get("events"))
        elif kind == "answer":
            conversation.ask(values)
        elif kind == "silence":
            conversation.silence(values)
        elif kind == "replace":
            conversation.replace(Timeline.read(values.get("timeline")))
        else:
            raise Refused("message", f"the type must be play, answer, silence or replace, got {in_words(kind)}")

    def _post(self, message: dict[str, Any]) -> None:
        self._unsent.put_nowait(message)
        if self._unsent.qsize() > _MOST_UNSENT and self._closing is None:
            self._closing = asyncio.create_task(self._close(POLICY, "this client does not read what it is sent"))

    async def _send(self) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):
            while True:
                await self._socket.send_text(json.dumps(await self._unsent.get(), separators=(",", ":")))

    async def _close(self, code: int, reason: str) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):
            await self._socket.close(code, reason.encode()[:120].decode(errors="ignore"))  # a frame holds 123 bytes


def _read(text: str) -> dict[str, Any]:
    try:
        return read_body(text.encode())
    except (Refusal, UnicodeEncodeError) as error:
        raise Refused("message", "a message must be a JSON object in UTF-8") from error
