"""L5: TLSChannel, where TLS is put between the socket's bytes and the callbacks' bytes.

Laws
1. A plain connection runs nothing of this: `_detour` sends received bytes here, a SecureFlow in place of the
   WriteFlow what is sent.
2. During the handshake only the strand touches the codec, without a lock, because the context's functions
   (SNI) are user code. From then on whoever holds the connection's lock may.
3. on_connect comes after the handshake; what others ask for before that waits for it. The handshake goes on
   while reading is paused.
4. What was sent before start_tls goes in the clear, what is sent after it waits for the handshake. What was
   received and not delivered when it was called is the peer's part of the handshake, never plaintext. Where
   that was in a burst, its receives are cancelled, and what they bring is decrypted when all are back.
5. close_notify is sent before each FIN. A FIN without one is a truncation, which ends the connection.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import _lifecycle as life
from ._addresses import Address, format_address
from ._burst import EOF, NOTHING, Burst
from ._errors import ConnectionClosedError
from ._filechannel import FileChannel
from ._lifecycle import CloseReason
from ._lifetime import DELIVERING, IDLE, POSTED
from ._options import Settings

if TYPE_CHECKING:
    import ssl

    from .tls import SecureFlow, TLSCodec

log = logging.getLogger("iocp_ctypes")


def make_codec(
    name: str,
    context: Any,
    server_side: bool,
    server_hostname: str | None = None,
    session: ssl.SSLSession | None = None,
) -> TLSCodec:
    """Return a codec for checked arguments; `name` is that of the argument `context`. See TLSCodec."""
    from .tls import TLSCodec, check_context

    check_context(name, context, server_side)
    if server_hostname is not None and not isinstance(server_hostname, str):
        raise TypeError(f"server_hostname={server_hostname!r}: must be a name or None")
    if server_side and (server_hostname or session is not None):
        raise ValueError("server_hostname and session are for the client's side of a handshake")
    try:
        return TLSCodec(context, server_side=server_side, server_hostname=server_hostname, session=session)
    except ValueError as exc:
        raise ValueError(f"{name}={context!r} with server_hostname={server_hostname!r}: {exc}") from exc


def check_tls(settings: Settings) -> Settings:
    """Return a server's settings where their context, if there is one, is a server's."""
    if settings.tls is not None:
        from .tls import check_context

        check_context("tls", settings.tls, server_side=True)
    return settings


class TLSChannel(FileChannel):
    """A channel that may be secured; `tls` is imported where that is done, so that others do without."""

    __slots__ = ()

    def on_tls(self) -> None: ...

    # -- the beginning --------------------------------------------------------------------------------------

    def _attach(self, server: Any, home: Any, sock: Any, settings: Settings, peer: Address) -> None:
        super()._attach(server, home, sock, settings, peer)
        if settings.tls is not None:  # from the first moment, for others may send before it begins
            from .tls import Handshake, SecureFlow

            self._flow = SecureFlow()
            self._shaking = Handshake(first=True)

    def _begin(self, first: bytes) -> None:
        """Begin the handshake, where there is one, which then calls on_connect. On the strand."""
        shaking = self._shaking
        if shaking is None or not shaking.first:
            if shaking is not None and self._tls is not None:  # another thread called start_tls already
                with self._lock:
                    self.bytes_received += len(first)
                    self._tls.feed(first)
                first = b""
            super()._begin(first)
            return
        if self._state >= life.JOINING:
            return
        codec, error = self._tls, ""
        if codec is None:  # a client's was made by `connect`, to have its arguments checked
            try:
                codec = make_codec("tls", self._settings.tls, True)
            except (OSError, ValueError) as exc:
                error = str(exc)
        if codec is None:  # it was checked when the server was made: something has changed it since
            text = f"the context of tls= cannot be used: {error}"
            log.error("connection %d from %s: %s", self.id, format_address(self._peer_address), text)
            with self._lock:
                self._fail(CloseReason.TLS, OSError(errno.EINVAL, text), reset=True)
            return
        with self._lock:
            self._use(codec)
            self._arm()
        self.bytes_received += len(first)
        self._deliver_secure(first)

    def _use(self, codec: TLSCodec) -> None:
        """From now on what comes goes through the codec. Needs the lock."""
        assert self._lock._is_owned()
        assert self._shaking is not None
        self._tls = self._secure_flow.codec = codec
        self._detour = True
        self._shaking.due = monotonic() + self._settings.tls_handshake_timeout

    @property
    def _secure_flow(self) -> SecureFlow:
        flow: Any = self._flow
        secure: SecureFlow = flow
        return secure

    def _start_tls(self, codec: TLSCodec, received: bytes) -> None:
        """Begin TLS on a connection that was plain."""
        from .tls import Handshake, SecureFlow

        with self._lock:
            if self._tls is not None or self._shaking is not None:
                raise RuntimeError(f"connection {self.id} uses TLS already")
            if self._state == life.CONNECTING:
                raise RuntimeError(f"connection {self.id} is not connected yet: connect() takes tls=")
            if self._flow.files:
                raise RuntimeError(f"connection {self.id} is sending a file: start_tls after its on_drain")
            if self._state > life.OPEN or self._eof_out or self._eof_in:
                raise ConnectionClosedError(f"connection {self.id} has ended in one direction, or both")
            self._flow = SecureFlow(self._flow)
            shaking = self._shaking = Handshake(first=False)
            shaking.pause, self._paused = self._paused, False
            self._use(codec)
            codec.spoken = bool(self.bytes_received)
            for data in (received, *(self._stash or ())):
                codec.feed(data)
            self._stash = None
            if self._burst is not None:
                self._burst_cancel(self._burst, kept=0)
                self._burst_next(self._burst)
            self._arm()
            self._strand.post(self._begin_tls)

    # -- the handshake --------------------------------------------------------------------------------------

    def _begin_tls(self) -> None:
        """Take the handshake of start_tls as far as it goes, and receive for it. On the strand."""
        with self._lock:
            idle = self._reading == IDLE  # else a receive is posted, or its bytes wait behind this task
            if idle:
                self._reading = DELIVERING
        if idle:
            self._deliver_secure(b"")
        elif self._shaking is not None:
            self._shake()

    def _shake(self) -> bool:
        """Take the handshake as far as it goes; return whether it is complete. On the strand."""
        codec, shaking = self._tls, self._shaking
        assert codec is not None
        assert shaking is not None
        done, error = False, None
        try:
            done = codec.handshake()
        except (OSError, ValueError) as exc:
            error = exc if isinstance(exc, OSError) else OSError(errno.EINVAL, str(exc))
            error.__traceback__ = None  # it refers to this connection
        told = False
        with self._lock:
            self._put_out(codec.output())
            if error is not None:
                self._tls_failed(error)
            elif done:
                told = self._state == life.OPEN
                self._shaken()
        if error is not None:
            peer = format_address(self._peer_address)
            log.debug("connection %d with %s: the TLS handshake failed: %s", self.id, peer, error)
        elif told:
            self._call(self.on_connect if shaking.first else self.on_tls)
        return done

    def _shaken(self) -> None:
        """The handshake is complete. Needs the lock."""
        shaking, self._shaking = self._shaking, None
        assert shaking is not None
        self._paused = shaking.pause
        if self._state == life.OPEN and shaking.first:
            self._opened = True
            self._silent_since = monotonic()
        for function, args in shaking.calls:
            self._strand.post(function, *args)
        self._secure_flow.open()
        if self._state < life.JOINING:
            self._send_on()
            self._advance()
            self._arm()

    def _handshake_late(self) -> None:
        """The handshake took too long. Needs the lock."""
        assert self._lock._is_owned()
        if self._is_deaf():
            assert self._shaking is not None
            self._shaking.due = None
            return
        text = f"no TLS handshake within tls_handshake_timeout={self._settings.tls_handshake_timeout:g} s"
        self._fail(CloseReason.TLS, TimeoutError(errno.ETIMEDOUT, text))

    def _post(self, task: Callable[..., object], *args: Any) -> None:
        """Queue a call on the strand; where on_connect is still to come, behind that. Needs the lock."""
        assert self._lock._is_owned()
        if self._shaking is not None and not self._opened:
            self._shaking.calls.append((task, args))
        else:
            self._strand.post(task, *args)

    def _hold(self, pause: bool) -> bool:
        """Note that reading shall be paused, or not, after the handshake; False where none is under way.

        Needs the lock.
        """
        assert self._lock._is_owned()
        if self._shaking is None:
            return False
        self._shaking.pause = pause
        return True

    # -- receiving ------------------------------------------------------------------------------------------

    def _post_burst(self) -> None:
        """Over TLS there is one receive at a time: decrypting takes longer than receiving."""
        if self._tls is None and self._shaking is None:
            super()._post_burst()
        else:
            self._post_receive(self._settings.recv_size)

    def _burst_next(self, burst: Burst) -> bool:
        """After start_tls: post nothing, and when all receives are back, decrypt what they brought.

        False: delivering is begun already. Needs the lock.
        """
        assert self._lock._is_owned()
        if self._tls is None or self._state >= life.JOINING:
            return super()._burst_next(burst)
        burst.delivering = False
        if burst.posted:
            self._reading = POSTED
            return False
        data, end = b"".join(burst.waiting()), burst.forget()
        self._burst_ended(burst, DELIVERING)
        self._strand.post(self._deliver_secure, data)
        if end is not NOTHING and end is not EOF:  # EOF the next receive brings again
            self._receive_failed(end)
        return False

    def _burst_drop(self, burst: Burst) -> None:
        """Closing, too, may need the peer's part of the handshake. Needs the lock."""
        if self._tls is None or self._state >= life.JOINING:
            super()._burst_drop(burst)
        else:
            self._burst_next(burst)

    def _burst_take(self) -> Any:
        """What has come is no plaintext any more. On the strand; needs the lock."""
        return super()._burst_take() if self._tls is None else NOTHING

    def _deliver_secure(self, data: bytes) -> None:
        """Decrypt what came, hand it to on_data, receive on. On the strand."""
        if self._shaking is not None:
            if not self._deliver_handshake(data):
                return
            data = b""
        most = max(self._settings.recv_size, len(data))
        plain = self._decrypt(most, data)
        while plain:
            if self._state == life.OPEN:
                try:
                    self.on_data(plain)
                except BaseException as exc:
                    self._callback_raised(exc)
            plain = self._decrypt(most, b"")
        if plain is not None:
            self._deliver_eof()

    def _deliver_handshake(self, data: bytes) -> bool:
        """Go on with the handshake, then receive on; return whether it is complete. On the strand."""
        assert self._tls is not None
        with self._lock:
            deaf = self._is_deaf()
            if not deaf:
                self._tls.feed(data)
        if not deaf and self._shake():
            return True
        with self._lock:
            self._receive_next()
        return False

    def _is_deaf(self) -> bool:
        """Whether what comes is dropped: we are closing, and need nothing of the peer for it."""
        codec = self._tls
        if self._state == life.OPEN:
            return False
        if self._state != life.DRAINING or codec is None or codec.closed:
            return True
        return self._shaking is None and not self._secure_flow.blocked

    def _decrypt(self, most: int, data: bytes) -> bytes | None:
        """Take ciphertext; return the next plaintext, none of it at the peer's close_notify.

        None where all is done for now: then the next receive is posted, or resume_reading has it posted.
        """
        codec = self._tls
        assert codec is not None
        with self._lock:
            if self._state == life.OPEN or not self._is_deaf():
                if data:
                    codec.feed(data)
                if self._state == life.OPEN and self._paused:
                    self._reading = IDLE  # what the codec has waits there
                    return None
                error = plain = None
                try:
                    plain = codec.read(most)
                except OSError as exc:
                    error = exc.with_traceback(None)  # it refers to this connection
                if out := codec.output():
                    self._put_out(out)
                if error is not None:
                    self._tls_failed(error)
                elif self._secure_flow.blocked:
                    self._send_on()
                    self._advance()
                if plain is not None:
                    return plain
            if codec.ended and self._state == life.OPEN:
                self._eof_in = True
                return b""
            if self._eof_in and self._state == life.OPEN:
                self._truncated()
            self._receive_next()
            return None

    def _cut_off(self) -> bool:
        """The peer's FIN came, without close_notify; False where there was one before. On the strand."""
        assert self._tls is not None
        if self._tls.ended:
            return False
        with self._lock:
            self._reading = IDLE
            if self._state == life.OPEN and not self._paused:  # else resume_reading has it told
                self._truncated()
            self._join()
        return True

    def _truncated(self) -> None:
        """The peer ended without close_notify. Needs the lock."""
        assert self._lock._is_owned()
        from .tls import truncated

        self._fail(CloseReason.TLS, truncated())

    def _is_silent(self) -> bool:
        """Over TLS the handshake does not count: who says nothing behind it is silent."""
        codec = self._tls
        return not (self._paused or (self.bytes_received if codec is None else codec.spoken))

    # -- sending --------------------------------------------------------------------------------------------

    @property
    def _transmits(self) -> bool:
        """A file is encrypted, so it is read and goes the way of all bytes."""
        return self._tls is None and self._shaking is None and super()._transmits

    def _put_out(self, data: bytes) -> None:
        """Send what TLS has to say by itself. Needs the lock."""
        assert self._lock._is_owned()
        codec, flow = self._tls, self._secure_flow
        assert codec is not None
        if not data or codec.closed or self._state >= life.LINGERING:
            return
        flow.push_wire(data)
        if self._shaking is None and flow.size > self._settings.write_buffer_max:
            self._overflow()  # a peer that asks for new keys again and again, and does not read
        else:
            self._flush()

    def _nothing_encrypted(self) -> None:
        """Sending has to wait for TLS, which receives first, or has failed. Needs the lock."""
        error = self._secure_flow.error
        if error is not None:
            self._fail(CloseReason.TLS, error)

    # -- the end --------------------------------------------------------------------------------------------

    def _tls_failed(self, error: OSError) -> None:
        """End because of TLS: gracefully, so that the peer gets our alert. Needs the lock."""
        codec = self._tls
        assert codec is not None
        codec.closed = True
        if self._state == life.OPEN:
            self._error = error
            self._secure_flow.drop_plain()
            self._close_files()
            if self._shaking is not None:
                self._shaking.due = None
            super()._close(CloseReason.TLS)
        else:
            self._fail(CloseReason.TLS, error)

    def _close(self, reason: CloseReason) -> None:
        """Close gracefully; before on_connect as while connecting, at once. Needs the lock."""
        assert self._lock._is_owned()
        if self._shaking is not None and self._shaking.first:
            self._fail(reason, None)
        else:
            super()._close(reason)

    def _finish_tls(self) -> bool:
        """Send close_notify; True where FIN may follow. Needs the lock."""
        assert self._lock._is_owned()
        codec, flow = self._tls, self._secure_flow
        if self._state >= life.JOINING:
            return True
        if self._shaking is not None and (self._state == life.OPEN or flow.secret or flow.files):
            if self._eof_in and self._state != life.OPEN:
                self._truncated()
            return False
        if flow.files:
            return False
        if codec is not None and self._shaking is None and not codec.closed:
            codec.close()
            flow.push_wire(codec.output())
            self._flush()
        return not (flow.queued or flow.sends)

    def _deliver_close(self) -> None:
        """See Lifetime; what waited for on_connect comes first, where on_connect never came."""
        shaking, self._shaking = self._shaking, None
        if shaking is not None:
            for function, args in shaking.calls:
                function(*args)
        super()._deliver_close()
