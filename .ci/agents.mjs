// Programs that use responses and chats, unmodified, against together_fake.py.
//
//     node agents.mjs        needs openai, @openai/agents, ai, @ai-sdk/* and zod beside this file
//
// PYTHON is the interpreter (python3), TOGETHER_FAKE the file to serve (together_fake.py).

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { describe, test } from 'node:test';

import { createOpenAI } from '@ai-sdk/openai';
import { createTogetherAI } from '@ai-sdk/togetherai';
import { Agent, OpenAIResponsesModel, Runner, setTracingDisabled, tool as agentTool } from '@openai/agents';
import * as ai from 'ai';
import OpenAI from 'openai';
import { zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const MODEL = 'meta-llama/Llama-3.3-70B-Instruct-Turbo';
const THINKER = 'openai/gpt-oss-20b';
const QUESTION = 'Why is the sky blue?';

const { PYTHON = 'python3', TOGETHER_FAKE = 'together_fake.py' } = process.env;
const server = spawn(PYTHON, [TOGETHER_FAKE, '--port', '0', '--quiet'], {
  stdio: ['ignore', 'pipe', 'inherit'],
});
process.on('exit', () => server.kill());
const url = await readUrl(server.stdout);
server.unref(); // the process ends with its last test
server.stdout.unref();

async function readUrl(output) {
  for await (const line of createInterface({ input: output })) {
    const found = line.match(/http:\/\/127\.0\.0\.1:\d+/);
    if (found) return found[0];
  }
  throw new Error('together_fake.py ended without saying where it listens');
}

const settings = { baseURL: `${url}/v1`, apiKey: 'parlel-together' };
const openai = new OpenAI({ ...settings, maxRetries: 0 });
setTracingDisabled(true);

const Person = z.object({
  name: z.string(),
  age: z.number().int().min(0).max(120),
  role: z.enum(['admin', 'guest']),
  addresses: z.array(z.object({ city: z.string(), main: z.boolean() })).min(1),
});
const weather = {
  type: 'function',
  name: 'get_weather',
  description: 'Get the weather of a city',
  strict: true,
  parameters: {
    type: 'object',
    properties: { city: { type: 'string' } },
    required: ['city'],
    additionalProperties: false,
  },
};
const wiki = { type: 'mcp', server_label: 'wiki', server_url: 'https://wiki.test/mcp' };

async function collect(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

async function raised(promise) {
  return promise.then(
    () => assert.fail('no error was raised'),
    (error) => error,
  );
}

describe('openai', () => {
  for (const model of [MODEL, THINKER]) {
    test(`${model}: streams the same response`, async () => {
      const whole = await openai.responses.create({ model, input: QUESTION });
      assert.equal(whole.status, 'completed');
      assert.ok(whole.output_text.length > 0);
      const events = await collect(await openai.responses.create({ model, input: QUESTION, stream: true }));
      assert.deepEqual(events.map((event) => event.sequence_number), [...events.keys()]);
      assert.deepEqual(events.at(-1).response.output, whole.output);
      const deltas = events.filter((event) => event.type === 'response.output_text.delta');
      assert.equal(deltas.map((event) => event.delta).join(''), whole.output_text);
    });
  }

  test('the stream helper folds text, reasoning and calls', async () => {
    for (const request of [
      { model: THINKER, input: QUESTION },
      { model: MODEL, input: 'What is the weather?', tools: [weather] },
      { model: MODEL, input: QUESTION, max_output_tokens: 5 },
      { model: MODEL, input: 'Search the wiki.', tools: [wiki] },
    ]) {
      const final = await openai.responses.stream(request).finalResponse();
      const whole = await openai.responses.create(request);
      assert.deepEqual(final.output.map(({ type }) => type), whole.output.map(({ type }) => type));
      assert.equal(final.status, whole.status);
    }
  });

  test('parse returns what zod accepts', async () => {
    const reply = await openai.responses.parse({
      model: MODEL,
      input: QUESTION,
      text: { format: zodTextFormat(Person, 'person') },
    });
    Person.parse(reply.output_parsed);
  });

  test('a tool is called, and its output answered', async () => {
    const input = [{ role: 'user', content: 'What is the weather in Lisbon?' }];
    const first = await openai.responses.create({ model: MODEL, input, tools: [weather] });
    const [call] = first.output;
    assert.equal(call.name, 'get_weather');
    assert.equal(typeof JSON.parse(call.arguments).city, 'string');
    input.push(call, { type: 'function_call_output', call_id: call.call_id, output: '21 degrees' });
    const second = await openai.responses.create({ model: MODEL, input, tools: [weather] });
    assert.deepEqual(second.output.map(({ type }) => type), ['message']);
  });

  test('nothing is stored', async () => {
    const refused = [
      openai.responses.create({ model: MODEL, input: QUESTION, previous_response_id: 'resp_1' }),
      openai.responses.retrieve('resp_1'),
    ];
    for (const error of await Promise.all(refused.map(raised))) assert.ok(error instanceof OpenAI.NotFoundError);
  });
});

describe('@ai-sdk/openai', () => {
  const model = createOpenAI(settings)(MODEL);
  const thinker = createOpenAI(settings)(THINKER);
  const calls = [];
  const tools = {
    get_weather: ai.tool({
      description: 'Get the weather of a city',
      inputSchema: z.object({ city: z.string() }),
      execute: async ({ city }) => {
        calls.push(city);
        return { degrees: 21 };
      },
    }),
  };

  test('generates and streams text', async () => {
    const { text, usage } = await ai.generateText({ model, prompt: QUESTION });
    assert.ok(text.length > 0);
    assert.ok(usage.outputTokens > 0);
    const streamed = await collect(ai.streamText({ model, prompt: QUESTION }).textStream);
    assert.equal(streamed.join(''), text);
    assert.ok(streamed.length > 1);
  });

  for (const stream of [false, true]) {
    test(`runs a tool and ends, ${stream ? 'streamed' : 'whole'}`, async () => {
      for (const each of [model, thinker]) {
        calls.length = 0;
        const request = { model: each, prompt: 'What is the weather?', tools, stopWhen: ai.stepCountIs(5) };
        const result = stream ? ai.streamText(request) : await ai.generateText(request);
        assert.ok((await result.text).length > 0);
        assert.equal((await result.steps).length, 2);
        assert.equal(calls.length, 1);
      }
    });
  }

  test('shows reasoning where a summary is asked', async () => {
    const { reasoningText } = await ai.generateText({
      model: thinker,
      prompt: QUESTION,
      providerOptions: { openai: { reasoningSummary: 'auto', forceReasoning: true } },
    });
    assert.ok(reasoningText.length > 0);
  });

  test('generates objects', async () => {
    const { output } = await ai.generateText({
      model,
      prompt: QUESTION,
      output: ai.Output.object({ schema: Person }),
    });
    Person.parse(output);
  });

  test('sees an image, and the end at the limit', async () => {
    const pixel = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==';
    const viewer = createOpenAI(settings)('meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8');
    const content = [
      { type: 'text', text: 'What is this?' },
      { type: 'image', image: pixel, mediaType: 'image/png' },
    ];
    const { finishReason, usage } = await ai.generateText({
      model: viewer,
      messages: [{ role: 'user', content }],
      maxOutputTokens: 5,
    });
    assert.equal(finishReason, 'length');
    assert.ok(usage.inputTokens > 100);
  });
});

describe('@openai/agents', () => {
  const model = new OpenAIResponsesModel(openai, MODEL);
  const thinker = new OpenAIResponsesModel(openai, THINKER);
  const runner = new Runner({ tracingDisabled: true });
  const calls = [];
  const getWeather = agentTool({
    name: 'get_weather',
    description: 'Get the weather of a city',
    parameters: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      calls.push(city);
      return '21 degrees';
    },
  });

  for (const stream of [false, true]) {
    test(`an agent calls its tool and ends, ${stream ? 'streamed' : 'whole'}`, async () => {
      for (const each of [model, thinker]) {
        calls.length = 0;
        const agent = new Agent({ name: 'Guide', instructions: 'Help.', model: each, tools: [getWeather] });
        const result = await runner.run(agent, 'What is the weather like?', { stream });
        if (stream) await result.completed;
        assert.equal(calls.length, 1);
        assert.ok(result.finalOutput.length > 0);
      }
    });
  }

  test('an agent hands over to another', async () => {
    const other = new Agent({ name: 'Weather', model, tools: [getWeather] });
    const triage = Agent.create({ name: 'Triage', model, handoffs: [other] });
    const result = await runner.run(triage, 'transfer me, and tell the weather');
    assert.equal(result.lastAgent.name, 'Weather');
    assert.ok(result.finalOutput.length > 0);
  });

  test('an agent returns an object', async () => {
    const clerk = new Agent({ name: 'Clerk', model, outputType: Person });
    const result = await runner.run(clerk, 'Who is that?');
    Person.parse(result.finalOutput);
  });
});

describe('chats of each engine', () => {
  const models = [
    MODEL,
    'google/gemma-4-31B-it',
    THINKER,
    'openai/gpt-oss-120b',
    'moonshotai/Kimi-K2.7-Code',
    'moonshotai/Kimi-K3',
    'deepseek-ai/DeepSeek-V4.1-Flash',
    'zai-org/GLM-5.3',
    'Qwen/Qwen3.7-Plus', // which only streams
  ];
  const asked = { getWeather: 'How is the weather?', findCity: 'And the largest city of Chile?' };
  const providers = {
    '@ai-sdk/openai': createOpenAI(settings).chat,
    '@ai-sdk/togetherai': createTogetherAI(settings),
  };
  test('the numbers that Qwen has as logprobs break @ai-sdk/openai, as in production', async () => {
    const result = ai.streamText({ model: providers['@ai-sdk/openai'](models.at(-1)), prompt: QUESTION, onError() {} });
    assert.ok((await collect(result.fullStream)).some(({ type }) => type === 'error'));
  });

  for (const [name, provider] of Object.entries(providers)) {
    for (const id of models) {
      for (const ask of [ai.generateText, ai.streamText]) {
        if (id.startsWith('Qwen/') && (ask === ai.generateText || name === '@ai-sdk/openai')) continue;
        test(`${name}, ${ask.name}, ${id}: two rounds of tools`, async () => {
          const called = [];
          const tool = (name, description, key) =>
            ai.tool({
              description,
              inputSchema: z.object({ [key]: z.string() }),
              execute: async () => called.push(name),
            });
          const tools = {
            findCity: tool('findCity', 'Find the largest city of a country', 'country'),
            getWeather: tool('getWeather', 'Get the weather of a place', 'city'),
          };
          const messages = [];
          for (const content of Object.values(asked)) {
            messages.push({ role: 'user', content });
            const result = await ask({ model: provider(id), messages, tools, stopWhen: ai.stepCountIs(4) });
            assert.ok((await result.text).length > 0);
            assert.ok((await result.totalUsage).totalTokens > 0);
            messages.push(...(await result.response).messages);
          }
          assert.deepEqual(called, Object.keys(asked));
        });
      }
    }
  }
});
