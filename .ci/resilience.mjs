// The program of resilience.py for clients of Node: a fault's name a line in, an outcome a line out.
//
//     node resilience.mjs NAME URL        needs the client beside this file

import { createInterface } from 'node:readline';

const MODEL = 'meta-llama/Llama-3.3-70B-Instruct-Turbo';
const KEY = 'parlel-together';
const PATIENCE_MS = 2500;
const [name, baseURL] = process.argv.slice(2);
const parameters = { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] };
const tool = { type: 'function', function: { name: 'get_weather', description: 'Get the weather of a city', parameters } };

// What a call is, where it makes sense.
function isKnown(call) {
  try {
    return call.name === 'get_weather' && typeof JSON.parse(call.arguments).city === 'string';
  } catch {
    return false;
  }
}

// Asks with a generated client; returns the text and the tool calls, as a program joins them.
async function makeAsker() {
  const { default: Client } = await import(name === 'npm openai' ? 'openai' : 'together-ai');
  const client = new Client({ baseURL, apiKey: KEY, timeout: PATIENCE_MS });
  return async (messages, more) => {
    const calls = [];
    let text = '';
    const controller = new AbortController();
    for await (const chunk of await client.chat.completions.create({ model: MODEL, messages, stream: true, ...more }, { signal: controller.signal })) {
      for (const { delta } of chunk.choices ?? []) {
        text += delta.content ?? '';
        for (const part of delta.tool_calls ?? []) {
          calls[part.index ?? 0] ??= { name: '', arguments: '' };
          calls[part.index ?? 0].name += part.function?.name ?? '';
          calls[part.index ?? 0].arguments += part.function?.arguments ?? '';
        }
      }
    }
    return { text, calls };
  };
}

async function converse(ask, withTools) {
  const messages = [{ role: 'user', content: 'Tell me about the weather in Rome.' }];
  const { text, calls } = await ask(messages, withTools ? { tools: [tool] } : {});
  if (withTools && !(calls.length && calls.every(isKnown))) return 'passes on';
  messages.push({ role: 'assistant', content: text }, { role: 'user', content: 'Go on.' });
  await ask(messages, {});
  return 'ok';
}

// The AI SDK runs tools itself, and has an opinion on calls that make no sense.
async function makeAiSdk() {
  const { streamText, stepCountIs } = await import('ai');
  const { z } = await import('zod');
  const { createOpenAI } = await import('@ai-sdk/openai');
  const model = createOpenAI({ baseURL, apiKey: KEY }).chat(MODEL);
  const weather = { description: 'Get the weather of a city', inputSchema: z.object({ city: z.string() }), execute: async () => 'Sunny.' };
  const run = async (messages, tools) => {
    let failure;
    const result = streamText({ model, messages, tools, stopWhen: stepCountIs(3), abortSignal: AbortSignal.timeout(4 * PATIENCE_MS), onError: ({ error }) => (failure = error) });
    const text = await result.text;
    const content = (await result.steps).flatMap((step) => step.content);
    if (failure) throw failure;
    return { text, called: content.some((part) => part.type === 'tool-call') };
  };
  return async (withTools) => {
    const messages = [{ role: 'user', content: 'Tell me about the weather in Rome.' }];
    const { text, called } = await run(messages, withTools ? { get_weather: weather } : undefined);
    if (withTools) return called ? 'ok' : 'passes on';
    messages.push({ role: 'assistant', content: text }, { role: 'user', content: 'Go on.' });
    await run(messages);
    return 'ok';
  };
}

const ask = name === 'ai' ? undefined : await makeAsker();
const runAi = name === 'ai' ? await makeAiSdk() : undefined;
for await (const line of createInterface({ input: process.stdin })) {
  const [fault, withTools] = JSON.parse(line);
  let outcome;
  try {
    outcome = await (ask ? converse(ask, withTools) : runAi(withTools));
  } catch (error) {
    outcome = 'raises';
    console.error(`${name}, ${fault}: ${error}`);
  }
  console.log(JSON.stringify(outcome));
}
process.exit(0);
