// What every program here prints: one line of JSON per thing that it was told to do.

/** Do what the command line says, one after another, each by its name in doing. Each gets an object that it fills with
 * what it sees: text, finish, chunks, usage (input, of it cached, output) and cost. What it throws is part of that. */
export async function main(doing) {
  for (const name of process.argv.slice(2)) {
    const saw = { text: "", finish: null, chunks: 0, usage: null, cost: null, error: null };
    try {
      await doing[name](saw);
    } catch (error) {
      saw.error = described(error);
    }
    console.log(JSON.stringify(saw));
  }
}

/** Tokens of a request: input includes cached. */
export function usageOf(input, output, cached) {
  return { input, output, cached: cached ?? 0 };
}

function described(error) {
  // The AI SDK wraps what its attempts threw, openai and anthropic hold the body's error, or the body.
  const last = error.lastError ?? error;
  const body = last.data?.error ?? last.error?.error ?? last.error ?? parsed(last.responseBody) ?? {};
  return {
    class: error.constructor.name,
    name: error.name,
    status: last.status ?? last.statusCode ?? null,
    code: body.code ?? last.code ?? null,
    type: body.type ?? last.type ?? null,
    metadata: body.metadata ?? null,
    message: String(error.message ?? error),
  };
}

function parsed(text) {
  try {
    return JSON.parse(text).error;
  } catch {
    return undefined;
  }
}
