// A program on the AI SDK. OPENAI_BASE_URL, OPENAI_API_KEY, ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY say where, MODEL,
// PROMPT and MAX_TOKENS what.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { main, usageOf } from "./report.mjs";

const { MODEL: name, PROMPT: prompt, OPENAI_BASE_URL: baseURL, OPENAI_API_KEY: apiKey } = process.env;
const maxOutputTokens = Number(process.env.MAX_TOKENS);
const openai = createOpenAI();
const compatible = createOpenAICompatible({ name: "gateway", baseURL, apiKey, includeUsage: true });
const models = {
  chat: openai.chat(name),
  responses: openai(name), // what a program gets that says nothing
  compatible: compatible(name),
  messages: createAnthropic()(name),
};

function look(saw, finish, usage, headers) {
  saw.finish = finish;
  saw.usage = usageOf(usage.inputTokens, usage.outputTokens, usage.cachedInputTokens);
  saw.cost = headers?.["x-credits-cost"] ?? null;
}

async function whole(model, saw) {
  const answer = await generateText({ model, prompt, maxOutputTokens });
  saw.text = answer.text;
  look(saw, answer.finishReason, answer.usage, answer.response.headers);
}

async function stream(model, saw) {
  const answer = streamText({ model, prompt, maxOutputTokens, onError() {} });
  for await (const part of answer.fullStream) {
    saw.chunks += 1;
    if (part.type === "text-delta") saw.text += part.text;
    if (part.type === "error") throw part.error;
    if (part.type === "finish") look(saw, part.finishReason, part.totalUsage);
  }
}

const doing = {};
for (const [api, model] of Object.entries(models)) {
  doing[api] = (saw) => whole(model, saw);
  doing[`${api}_stream`] = (saw) => stream(model, saw);
}
await main(doing);
