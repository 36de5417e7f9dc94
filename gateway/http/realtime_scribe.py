"""The transcription of what a session hears: another model, held for and charged at its own prices."""

from gateway.apis.realtime_answers import ServerEvent, TranscriptUsage, read_transcript_usage
from gateway.apis.realtime_audio import estimated_tokens, most_tokens
from gateway.apis.realtime_conversation import Conversation, Size
from gateway.domain.decision import Settlement
from gateway.domain.metered import Metered
from gateway.domain.model import Model
from gateway.domain.request import MIN_OUTPUT_TOKENS
from gateway.http.holding import CreditsEnded
from gateway.http.realtime_turn import Turn, Use
from gateway.http.realtime_turns import Turns


class Scribe:
    """Holds for the audio that is not transcribed yet: for all that was sent, and for a token of text per token of
    speech. prompt_bytes: what the model is told besides."""

    def __init__(self, turns: Turns, model: Model, prompt_bytes: int, conversation: Conversation) -> None:
        self.model = model
        self.turn: Turn | None = None
        self._turns = turns
        self._prompt = prompt_bytes
        self._conversation = conversation
        self._from_ms = conversation.audio_ms
        self._until_ms: int | None = None
        self._coming = 0
        self._waiting = 0

    def go_on(self, prompt_bytes: int) -> None:
        """The client asks for it again."""
        self._until_ms, self._prompt = None, max(self._prompt, prompt_bytes)

    def stop(self) -> None:
        """The client asks for no more of it."""
        self._until_ms = self._conversation.audio_ms if self._until_ms is None else self._until_ms

    async def cover(self) -> None:
        """Hold for all audio that can be transcribed by now. Raises as Turns.covered_spare."""
        while self._audio_ms > 0:
            try:
                use = self._use()
                self.turn = self.turn or await self._turns.reserve(self.model, use)
                self.turn.use = use
                await self.turn.cover(patient=not self._turns.busy)
            except CreditsEnded:
                if not self._turns.busy:
                    raise
                await self._turns.lock.wait()
            else:
                return

    def commits(self, count: int = 1) -> None:
        """The client or the upstream has more to commit; less, where a commit of the client's was refused."""
        self._coming = max(0, self._coming + count)

    def committed(self) -> None:
        """The upstream takes audio out of the buffer, and will transcribe it."""
        self.commits(-1)
        self._waiting += 1

    def show(self) -> None:
        """The client gets a part of a transcript."""
        if self.turn is not None:
            self.turn.hand_out()

    async def completed(self, event: ServerEvent) -> Settlement | None:
        """A transcript is done: charge it; what that came to, if the store has said so."""
        turn, usage = self.turn, read_transcript_usage(event.document)
        if turn is None:
            return None
        self.turn = None
        metered = self.billed(turn, usage)
        await turn.settle(metered)
        counted = usage.input_tokens is not None and self.model.prices.tokens is not None
        self.over(usage.audio_ms or 0 if counted or usage.audio_ms is not None else metered.audio_ms)
        return turn.exchange.settlement

    def over(self, audio_ms: int = 0) -> None:
        """A transcript is done, of so much audio at least, or will not come. That need not be held for any more."""
        self._waiting = max(0, self._waiting - 1)
        reached = self._conversation.reached_ms
        if self._waiting or self._coming:
            reached = min(reached, self._from_ms + audio_ms)
        self._from_ms = max(self._from_ms, reached)

    def billed(self, turn: Turn, usage: TranscriptUsage) -> Metered:
        """What to charge for a transcript, never above what can have been transcribed."""
        reached_ms = max(0, min(self._conversation.reached_ms - self._from_ms, turn.use.audio_ms))
        audio_ms = reached_ms if usage.audio_ms is None else min(usage.audio_ms, turn.use.audio_ms)
        tokens = estimated_tokens(audio_ms)
        given = min(tokens if usage.input_tokens is None else usage.input_tokens, turn.use.size.most)
        made = tokens if usage.output_tokens is None else usage.output_tokens
        heard = usage.audio_tokens if usage.input_tokens is not None else given
        return Metered(
            input=given,
            output=min(made, turn.use.output_most),
            audio_input=min(heard, given),
            audio_ms=audio_ms,
            requests=1,
        )

    @property
    def _audio_ms(self) -> int:
        until = self._conversation.audio_ms if self._until_ms is None else self._until_ms
        return until - self._from_ms

    def _use(self) -> Use:
        tokens = most_tokens(self._audio_ms)
        most = tokens + self._prompt + self.model.template_tokens
        size = Size(min(most, self.model.context_window or most), audio=estimated_tokens(self._audio_ms))
        return Use(size, tokens + MIN_OUTPUT_TOKENS, self._audio_ms, whole=True)
