"""The YAML files as they are written. Unknown keys are errors; defaults are in the files' own notation.

Rules that join several values (one default plan, one kind of allowance) are in checks.py. The descriptions and
examples here appear in the JSON Schema and in the messages about missing keys.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator

from gateway.config.fields import (
    ArchiveUrl,
    AudioSeconds,
    BaseUrl,
    Boolean,
    CountWay,
    CreditsNano,
    Directory,
    FallbackReference,
    FieldNames,
    KeyPlace,
    LimitField,
    Listen,
    Methods,
    ModelName,
    OnLostWay,
    OtherModel,
    PathPattern,
    RatePpm,
    RefreshMs,
    SecretText,
    ShortName,
    SizeBytes,
    StoreTimeoutMs,
    StoreUrl,
    TemplateTokens,
    TimeoutMs,
    Tokens,
    TokensWithin,
    Unit,
    UpstreamReference,
)
from gateway.config.prices import (
    IMAGE_KEYS,
    CharacterFemto,
    ImageFemto,
    ImageKind,
    RequestFemto,
    SecondFemto,
    TokenFemto,
)
from gateway.domain.model import MAX_FALLBACKS
from gateway.domain.plan import MAX_WINDOWS
from gateway.domain.price import MAX_TIERS


class _Mapping(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RawAdmin(_Mapping):
    """The admin listener: metrics, health and the admin API."""

    listen: Listen = Field(default="127.0.0.1:9090", validate_default=True, description="host:port, IPv6 in brackets")
    token: SecretText = Field(
        default="", validate_default=True, description="What admin requests must show; empty for none"
    )


class RawStore(_Mapping):
    """Where the credits live."""

    url: StoreUrl = Field(
        default="embedded",
        validate_default=True,
        description="embedded, or a redis://, rediss://, unix://, redis+cluster:// or redis+sentinel:// URL",
    )
    data_dir: Directory = Field(
        default="./data",
        validate_default=True,
        description="The embedded store's directory; a relative one is relative to the working directory",
    )
    timeout: StoreTimeoutMs = Field(
        default="2s",
        validate_default=True,
        description="How long the store may take to answer, at most 60s; a tenth later it counts as down",
    )
    allow_unsafe: Boolean = Field(
        default="false",
        validate_default=True,
        description="Start even on a store whose settings may lose or evict credits",
    )


class RawArchive(_Mapping):
    """Where the ledger is kept for good."""

    url: ArchiveUrl = Field(
        default="sqlite",
        validate_default=True,
        description="sqlite (ledger.sqlite3 in the store's data_dir), sqlite:///path, or a postgresql:// URL",
    )


class RawUpstream(_Mapping):
    """A server that runs models and speaks OpenAI's protocol."""

    base_url: BaseUrl = Field(
        examples=["https://api.example.com/v1"], description="http(s) URL to which /chat/completions is appended"
    )
    api_key: SecretText | None = Field(
        default=None,
        description="The upstream's key. Leave the line out for a server that needs none; an empty value means "
        "that the upstream is not set up, and when none is, the built-in demo model answers",
    )
    key_header: KeyPlace = Field(
        default="authorization",
        validate_default=True,
        description="Where the upstream expects its key: authorization (as a bearer token) or x-api-key (Anthropic)",
    )
    connect_timeout: TimeoutMs = Field(
        default="10s", validate_default=True, description="The longest wait for a connection"
    )
    idle_timeout: TimeoutMs = Field(
        default="300s", validate_default=True, description="The longest silence of an answer"
    )
    total_timeout: TimeoutMs = Field(default="900s", validate_default=True, description="The longest answer")
    stream_usage: Boolean = Field(
        default="true",
        validate_default=True,
        description="Whether stream_options.include_usage may be added to requests",
    )
    limit_field: LimitField = Field(
        default="max_tokens",
        validate_default=True,
        description="The field that limits an answer: max_completion_tokens for OpenAI's newer models, which refuse "
        "the other; max_tokens for everything else, because older servers ignore the newer name",
    )
    allow_fields: FieldNames = Field(
        default=frozenset(),
        description="Request fields to let through beyond those known to cost nothing; what they do to the bill is "
        "then the operator's to know",
    )
    count_output: CountWay = Field(
        default="chunks",
        validate_default=True,
        description="How a stream's output is counted while it runs. chunks: an event is a token, and 4 bytes are at "
        "least one. bytes: every UTF-8 byte counts as a token, which is never too low. usage: the upstream reports its "
        "usage on every chunk, and the gateway asks it to. maximum: what the whole answer can cost is held at once",
    )


class RawAllowance(_Mapping):
    """Credits granted again in every window: exactly one of monthly and per_window."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["monthly"]}, {"required": ["per_window"]}]})

    monthly: CreditsNano | None = Field(
        default=None, description="Credits a calendar month (UTC), spread over its windows"
    )
    per_window: CreditsNano | None = Field(default=None, description="Credits in each window")
    refresh: RefreshMs = Field(examples=["24h"], description="The length of a window; divides 24 hours evenly")


def _or_one(schema: dict[str, Any]) -> None:
    """A list with one entry may be written as that entry."""
    choices = schema["anyOf"]
    choices.insert(0, next(choice["items"] for choice in choices if "items" in choice))


class RawPlan(_Mapping):
    """What an account may spend."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["allowance"]}, {"properties": {"payg": {"not": {"const": False}}}}]}
    )

    default: Boolean = Field(
        default="false", validate_default=True, description="The plan of new accounts; exactly one plan"
    )
    allowance: list[RawAllowance] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_WINDOWS,
        description="One window, or a list of up to 4 of different lengths, of which the tightest decides; leave it "
        "out for a plan that is only pay-as-you-go",
        json_schema_extra=_or_one,
    )
    rate: RatePpm = Field(
        default="1", validate_default=True, description="What the allowance pays of the list price, 0.01 to 10"
    )
    payg: Boolean = Field(
        default="true", validate_default=True, description="Whether prepaid credits pay beyond the allowance"
    )
    on_lost: OnLostWay = Field(
        default="charge_seen",
        validate_default=True,
        description="What a request is charged whose gateway died: charge_seen (what it was seen to cost), charge_hold "
        "(all that it held) or release (nothing)",
    )

    @field_validator("allowance", mode="before")
    @classmethod
    def _one_window_or_several(cls, value: object) -> object:
        return value if isinstance(value, list) else [value]


class RawTokenPrices(_Mapping):
    """Prices of tokens, in USD and the file's price_unit."""

    input_token_price: TokenFemto | None = Field(
        default=None, examples=["0.638"], description="USD; 0 for a free model"
    )
    output_token_price: TokenFemto | None = Field(
        default=None, examples=["0.768"], description="USD; 0 for an embedding model"
    )
    cache_read_token_price: TokenFemto | None = Field(default=None, description="USD; without it the input price")
    cache_write_token_price: TokenFemto | None = Field(default=None, description="USD; without it the input price")
    audio_input_token_price: TokenFemto | None = Field(default=None, description="USD; without it the input price")
    image_input_token_price: TokenFemto | None = Field(default=None, description="USD; without it the input price")
    audio_output_token_price: TokenFemto | None = Field(default=None, description="USD; without it the output price")
    image_output_token_price: TokenFemto | None = Field(default=None, description="USD; without it the output price")
    reasoning_token_price: TokenFemto | None = Field(default=None, description="USD; without it the output price")


TOKEN_PRICES = tuple(RawTokenPrices.model_fields)
#: Any one of these makes a model one that sells tokens, and then it needs all of NEEDED_FOR_TOKENS.
SELLS_TOKENS = (*TOKEN_PRICES, "tiers")
NEEDED_FOR_TOKENS = ("input_token_price", "output_token_price", "context_window", "max_output_tokens")
OTHER_PRICES = ("request_price", "second_price", "character_price", "image_prices")


def _any_of(names: tuple[str, ...]) -> dict[str, Any]:
    return {"anyOf": [{"required": [name]} for name in names]}


class RawTier(RawTokenPrices):
    """Prices of a long request's tokens, all of them; one that is left out is the model's own."""

    model_config = ConfigDict(json_schema_extra=_any_of(TOKEN_PRICES))

    above_input_tokens: Tokens = Field(
        examples=["200000"], description="The tier is for requests of more input tokens than this"
    )


class RawModel(RawTokenPrices):
    """A model that is sold, and its list prices: of tokens and characters in the file's price_unit, others in USD."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": _any_of(SELLS_TOKENS),
            "then": {"required": list(NEEDED_FOR_TOKENS)},
            "else": _any_of(OTHER_PRICES),
        }
    )

    upstream: UpstreamReference = Field(examples=["ionet"], description="The name of the upstream that serves it")
    tiers: list[RawTier] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_TIERS,
        description="Other prices of tokens for long requests: up to 4 tiers, each above the one before it",
    )
    request_price: RequestFemto | None = Field(default=None, description="USD per request, beside all else")
    second_price: SecondFemto | None = Field(default=None, description="USD per second of audio")
    character_price: CharacterFemto | None = Field(
        default=None, description="USD in the file's price_unit, per character of the text to be spoken"
    )
    image_prices: dict[ImageKind, ImageFemto] | None = Field(
        default=None,
        min_length=1,
        description='USD per image: by size (1024x1024), size and quality (1024x1024/high), quality ("*/high"), or "*" '
        "for every other; the closest counts, and a size is closer than a quality",
        json_schema_extra=IMAGE_KEYS,
    )
    context_window: Tokens | None = Field(
        default=None,
        examples=["128000"],
        description="Tokens of prompt and answer together; may be left out only where no token has a price",
    )
    max_output_tokens: TokensWithin | None = Field(
        default=None,
        examples=["8192"],
        description="The most tokens of one answer, at most the context window; may be left out likewise",
    )
    template_tokens: TemplateTokens = Field(
        default="256",
        validate_default=True,
        description="The most tokens that the upstream's chat template adds to a prompt",
    )
    upstream_model: OtherModel | None = Field(
        default=None, description="What the upstream calls the model; without it the same name that clients send"
    )
    max_audio_seconds: AudioSeconds | None = Field(
        default=None,
        examples=["1500"],
        description="The longest audio that the upstream takes; without it as long as the file could be",
    )
    fallbacks: list[FallbackReference] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_FALLBACKS,
        description="Models that answer in its place, in this order, where its upstream is away or fails before it "
        "answers (429 and 5xx). The one that answers is charged at its own price; the dearest is held",
    )
    hidden_reasoning: Boolean = Field(
        default="false",
        validate_default=True,
        description="Whether the model bills reasoning that it does not stream; a stream then holds its maximum",
    )


class PlansFile(_Mapping):
    """plans.yaml."""

    plans: dict[ShortName, RawPlan] = Field(description="The plans by name")


class ModelsFile(_Mapping):
    """models.yaml."""

    price_unit: Unit = Field(
        examples=["usd_per_million_tokens"], description="The unit of the prices of tokens and characters"
    )
    models: dict[ModelName, RawModel] = Field(min_length=1, description="The models by the name that clients send")


def _file_or(inline: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, inline]})


class RawLimits(_Mapping):
    """Sizes in bytes or with KiB, MiB, GiB; at most 1GiB."""

    body: SizeBytes = Field(default="32MiB", validate_default=True, description="The largest request body")
    response: SizeBytes = Field(default="64MiB", validate_default=True, description="The largest answer held in memory")
    upload: SizeBytes = Field(
        default="256MiB", validate_default=True, description="The largest upload (audio, images), which is kept on disk"
    )


class RawPassthrough(_Mapping):
    """A path that is forwarded unread."""

    upstream: UpstreamReference = Field(examples=["ionet"], description="The name of the upstream that serves it")
    request_price: RequestFemto = Field(examples=["0.001"], description="USD per request; 0 gives it away")
    methods: Methods = Field(default=frozenset({"GET", "POST"}), description="Those that are forwarded: [GET, POST]")


class MainFile(_Mapping):
    """gateway.yaml. ``${NAME}`` and ``${NAME:-default}`` in values come from the environment."""

    listen: Listen = Field(default="127.0.0.1:8080", validate_default=True, description="host:port, IPv6 in brackets")
    admin: RawAdmin = Field(default_factory=RawAdmin)
    store: RawStore = Field(default_factory=RawStore)
    upstreams: dict[ShortName, RawUpstream] = Field(min_length=1, description="The upstreams by name")
    plans: Annotated[Any, _file_or({"$ref": "#/$defs/PlansFile/properties/plans"})] = Field(
        examples=["plans.yaml"], description="A file beside this one, or the mapping of plans itself"
    )
    models: Annotated[Any, _file_or({"$ref": "#/$defs/ModelsFile"})] = Field(
        examples=["models.yaml"],
        description="A file beside this one, or its content: a mapping with price_unit and models",
    )
    passthrough: dict[PathPattern, RawPassthrough] = Field(
        default_factory=dict,
        description="Paths below /v1 to forward unread, each with a price per request: /files, or /files/* for all "
        "below it. Paths that the gateway meters itself are not touched by it",
    )
    limits: RawLimits = Field(default_factory=RawLimits)
    archive: RawArchive = Field(default_factory=RawArchive)
