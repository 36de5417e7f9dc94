"""A real llama.cpp server with a tiny random-weight model: real tokens, usage, streams and cancellation, no download.

``python -m tests.upstreams.llama --port N`` serves until it or its parent ends, and prints ``listening on URL``.
Its answers are seeded, pronounceable nonsense that never ends by itself: it runs to ``max_tokens``, a stop string or
the end of the context (some 5 s for all 4096 tokens), so that a test decides how long an answer is.

Seen of this server, and good for tests to know:

- It ignores the ``model`` of a request; answers and ``/v1/models`` name the alias.
- ``max_completion_tokens`` is honoured and beats ``max_tokens``; ``n_predict`` beats both. 0 generates one token.
  Without any it generates to the end of the context. A prompt beyond the context is a 400
  ``exceed_context_size_error``.
- Usage has ``prompt_tokens_details.cached_tokens``: a repeated prompt is almost all cached.
- Chat streams have usage only with ``include_usage`` (a last chunk with empty ``choices``). Completions streams
  always have it, on the chunk with the finish reason.
- ``n``: 1 to the number of parallel slots. Usage counts the output of one choice only; a stream sends one usage per
  choice. ``best_of`` and ``echo`` are ignored.
- A list of prompts in ``/v1/completions`` is answered whole but its usage is that of the first prompt only, input and
  output; streamed, it begins with ``data: null`` and sends one usage per prompt.
- A client that leaves a stream stops the generation at once. One that leaves an unstreamed request does not:
  it is generated to its end.
"""

import argparse
import os
import string
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import TokenType

from tests.upstreams.process import READY, ServerProcess, server_process

MODEL_NAME = "tiny-llama"
CONTEXT_TOKENS = 4096
PARALLEL = 4

_EMBEDDING, _HEADS, _LAYERS, _FEED_FORWARD = 64, 4, 2, 128
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_model(path: Path) -> None:
    """Write the model (about half a megabyte of seeded random weights, so always the same) to path."""
    tokens, types = _vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(_EMBEDDING)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_rope_dimension_count(_EMBEDDING // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    # Longer pieces merge first; what no piece covers falls back to one token per byte.
    writer.add_token_scores([float(len(token)) for token in tokens])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(4)
    writer.add_chat_template(_CHATML)
    _add_weights(writer, types)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary() -> tuple[list[str], list[TokenType]]:
    control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = ["▁", *(c for c in string.printable if c.isprintable() and c != " ")]
    syllables = ["".join(pair) for pair in product("bcdfghjklmnprstvwz", "aeiou")]
    pieces = [*characters, *syllables, *("▁" + syllable for syllable in syllables)]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 4, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * len(pieces)]
    return [*control, *every_byte, *pieces], types


def _add_weights(writer: gguf.GGUFWriter, types: list[TokenType]) -> None:
    random = np.random.default_rng(20260101)

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return random.standard_normal((rows, columns), np.float32) / np.float32(columns) ** np.float32(0.5)

    # Channel 0 is a constant that no layer writes to. The output layer reads it as a bias against the tokens
    # that are no text: an answer made of stray bytes or ended at once by chance would be useless to a test.
    embedding = random.standard_normal((len(types), _EMBEDDING), np.float32)
    embedding[:, 0] = 4.0
    output = 4 * matrix(len(types), _EMBEDDING)
    output[:, 0] = [0.0 if kind == TokenType.NORMAL else -20.0 for kind in types]
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(_EMBEDDING, np.float32))
    for layer in range(_LAYERS):
        shapes = {
            "attn_q": (_EMBEDDING, _EMBEDDING),
            "attn_k": (_EMBEDDING, _EMBEDDING),
            "attn_v": (_EMBEDDING, _EMBEDDING),
            "attn_output": (_EMBEDDING, _EMBEDDING),
            "ffn_gate": (_FEED_FORWARD, _EMBEDDING),
            "ffn_up": (_FEED_FORWARD, _EMBEDDING),
            "ffn_down": (_EMBEDDING, _FEED_FORWARD),
        }
        for name, shape in shapes.items():
            weight = matrix(*shape)
            if name in ("attn_output", "ffn_down"):
                weight[0] = 0.0
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(_EMBEDDING, np.float32))


@contextmanager
def llama_process(
    *,
    port: int = 0,
    alias: str = MODEL_NAME,
    embedding: bool = False,
    context: int = CONTEXT_TOKENS,
    parallel: int = PARALLEL,
) -> Iterator[ServerProcess]:
    """Run the server in a process of its own, on any free port unless one is given. context: tokens per request;
    parallel: requests served at once. Raises RuntimeError if it is not ready within a minute."""
    options = [f"--port={port}", f"--alias={alias}", f"--context={context}", f"--parallel={parallel}"]
    with server_process("tests.upstreams.llama", *options, *(["--embedding"] if embedding else [])) as server:
        yield server


@contextmanager
def running_llama(
    *,
    port: int = 0,
    alias: str = MODEL_NAME,
    embedding: bool = False,
    context: int = CONTEXT_TOKENS,
    parallel: int = PARALLEL,
) -> Iterator[str]:
    """As llama_process, for tests that need only the base URL (http://127.0.0.1:PORT/v1)."""
    with llama_process(port=port, alias=alias, embedding=embedding, context=context, parallel=parallel) as server:
        yield server.base_url


def _serve(*, port: int, alias: str, embedding: bool, context: int, parallel: int) -> None:
    import xllamacpp  # here, because it is 100 MB of library that the process running the tests has no use for

    parameters = xllamacpp.CommonParams()
    parameters.model_alias = {alias}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    parameters.n_parallel = parallel
    parameters.n_ctx = context * parallel
    parameters.n_gpu_layers = 0
    # One thread: at this size a second one costs more in waiting than it computes.
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 1
    parameters.sampling.seed = 1
    parameters.fit_params = False
    parameters.endpoint_metrics = True  # shows a test whether an abandoned answer is still being generated
    parameters.verbosity = 1
    if embedding:
        parameters.embedding = True
        parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    with tempfile.TemporaryDirectory(prefix="tiny-llama-") as directory:
        path = Path(directory, "model.gguf")
        write_model(path)
        parameters.model.path = str(path)
        server = xllamacpp.Server(parameters)  # has the file mapped once it listens; a SIGKILL leaves none behind
    print(f"{READY}{server.listening_address.rstrip('/')}/v1", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:  # a test run that dies by SIGKILL leaves no server behind either
        time.sleep(0.5)


def _main() -> None:
    parser = argparse.ArgumentParser(description="a llama.cpp server with a tiny random-weight model")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--alias", default=MODEL_NAME, help="the model's name in answers and /v1/models")
    parser.add_argument("--embedding", action="store_true", help="serve /v1/embeddings as well")
    parser.add_argument("--context", type=int, default=CONTEXT_TOKENS, help="tokens per request")
    parser.add_argument("--parallel", type=int, default=PARALLEL, help="requests served at once")
    _serve(**vars(parser.parse_args()))


if __name__ == "__main__":
    _main()
