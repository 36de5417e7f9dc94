// A program on the openai SDK. OPENAI_BASE_URL and OPENAI_API_KEY say where, MODEL, PROMPT and MAX_TOKENS what.
import OpenAI from "openai";
import { main, usageOf } from "./report.mjs";

const { MODEL: model, PROMPT: prompt } = process.env;
const maxTokens = Number(process.env.MAX_TOKENS);
const messages = [{ role: "user", content: prompt }];
const client = new OpenAI();

const usageOfChat = (usage) =>
  usageOf(usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details?.cached_tokens);
const usageOfResponse = (usage) =>
  usageOf(usage.input_tokens, usage.output_tokens, usage.input_tokens_details?.cached_tokens);

await main({
  async chat(saw) {
    const { data, response } = await client.chat.completions
      .create({ model, messages, max_tokens: maxTokens })
      .withResponse();
    saw.text = data.choices[0].message.content;
    saw.finish = data.choices[0].finish_reason;
    saw.usage = usageOfChat(data.usage);
    saw.cost = response.headers.get("x-credits-cost");
  },

  async chat_stream(saw) {
    const stream_options = { include_usage: true };
    const asked = { model, messages, max_tokens: maxTokens, stream: true, stream_options };
    for await (const chunk of await client.chat.completions.create(asked)) {
      saw.chunks += 1;
      for (const choice of chunk.choices) {
        saw.text += choice.delta.content ?? "";
        saw.finish = choice.finish_reason ?? saw.finish;
      }
      if (chunk.usage) {
        saw.usage = usageOfChat(chunk.usage);
        saw.cost = chunk.usage.credits?.cost ?? null;
      }
    }
  },

  async responses(saw) {
    const { data, response } = await client.responses
      .create({ model, input: prompt, max_output_tokens: maxTokens })
      .withResponse();
    saw.text = data.output_text;
    saw.finish = data.status;
    saw.usage = usageOfResponse(data.usage);
    saw.cost = response.headers.get("x-credits-cost");
  },

  async responses_stream(saw) {
    const asked = { model, input: prompt, max_output_tokens: maxTokens, stream: true };
    for await (const event of await client.responses.create(asked)) {
      saw.chunks += 1;
      if (event.type === "response.output_text.delta") saw.text += event.delta;
      if (["response.completed", "response.incomplete", "response.failed"].includes(event.type)) {
        saw.finish = event.response.status;
        saw.usage = usageOfResponse(event.response.usage);
        saw.cost = event.response.usage.credits?.cost ?? null;
      }
    }
  },
});
