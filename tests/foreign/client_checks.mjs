// What JavaScript's clients do: run by clients.py as `node client_checks.mjs CLIENT BASE_URL MODEL`.
import assert from "node:assert";
import OpenAI from "openai";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const [client, baseURL, model] = process.argv.slice(2);
const question = "What is the capital of France?";
const cities = ["Paris", "Madrid", "Rome"];
const weather = {
  type: "object",
  properties: { city: { type: "string", enum: cities } },
  required: ["city"],
  additionalProperties: false,
};
const country = {
  type: "object",
  properties: { name: { type: "string", enum: ["France", "Spain"] }, european: { type: "boolean" } },
  required: ["name", "european"],
  additionalProperties: false,
};

async function openai() {
  const api = new OpenAI({ baseURL, apiKey: "none" });
  const given = {
    model, messages: [{ role: "user", content: question }], temperature: 0, max_tokens: 48,
  };
  const whole = (await api.chat.completions.create(given)).choices[0].message.content;
  let streamed = "";
  for await (const chunk of await api.chat.completions.create({ ...given, stream: true })) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(streamed, whole);
  const tools = [{ type: "function", function: { name: "get_weather", parameters: weather } }];
  const stream = api.chat.completions.stream({ ...given, tools, tool_choice: "required" });
  const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
  assert(cities.includes(JSON.parse(call.function.arguments).city));
  const response_format = { type: "json_schema", json_schema: { name: "country", schema: country } };
  const reply = await api.chat.completions.create({ ...given, response_format });
  assert.equal(typeof JSON.parse(reply.choices[0].message.content).european, "boolean");
  const response = await api.responses.create({ model, input: question, temperature: 0, max_output_tokens: 48 });
  assert(response.output_text);
}

async function vercel(provider) {
  const given = { model: provider, prompt: question, temperature: 0, maxOutputTokens: 48, maxRetries: 0 };
  const { text } = await generateText(given);
  let streamed = "";
  for await (const piece of streamText(given).textStream) streamed += piece;
  assert(text);
  assert.equal(streamed, text);
  const tools = { get_weather: tool({ description: "The weather", inputSchema: jsonSchema(weather) }) };
  const { toolCalls } = await generateText({ ...given, tools, toolChoice: "required" });
  assert(cities.includes(toolCalls[0].input.city));
  const { object } = await generateObject({ ...given, schema: jsonSchema(country) });
  assert.equal(typeof object.european, "boolean");
}

const clients = {
  openai_js: openai,
  vercel_compatible: () =>
    vercel(createOpenAICompatible({ name: "llama", baseURL, supportsStructuredOutputs: true })(model)),
  vercel_chat: () => vercel(createOpenAI({ baseURL, apiKey: "none" }).chat(model)),
  vercel_responses: () => vercel(createOpenAI({ baseURL, apiKey: "none" }).responses(model)),
};
await clients[client]();
