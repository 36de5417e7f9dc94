// A program on the anthropic SDK. ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY say where, MODEL, PROMPT and MAX_TOKENS what.
import Anthropic from "@anthropic-ai/sdk";
import { main, usageOf } from "./report.mjs";

const asked = {
  model: process.env.MODEL,
  max_tokens: Number(process.env.MAX_TOKENS),
  messages: [{ role: "user", content: process.env.PROMPT }],
};
const client = new Anthropic();

function look(saw, answer) {
  const cached = answer.usage.cache_read_input_tokens ?? 0;
  saw.finish = answer.stop_reason;
  saw.usage = usageOf(answer.usage.input_tokens + cached, answer.usage.output_tokens, cached);
}

await main({
  async messages(saw) {
    const { data, response } = await client.messages.create(asked).withResponse();
    saw.text = data.content.map((block) => block.text).join("");
    saw.cost = response.headers.get("x-credits-cost");
    look(saw, data);
  },

  async messages_stream(saw) {
    const stream = client.messages.stream(asked);
    for await (const event of stream) {
      saw.chunks += 1;
      if (event.type === "content_block_delta") saw.text += event.delta.text;
      if (event.type === "message_delta") saw.cost = event.usage.credits?.cost ?? null;
    }
    look(saw, await stream.finalMessage());
  },
});
