// The official npm clients, unmodified and with their default settings, against together_fake.py.
//
//     node clients.mjs        needs together-ai, openai and zod beside this file
//
// PYTHON is the interpreter (python3), TOGETHER_FAKE the file to serve (together_fake.py).

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { describe, test } from 'node:test';

import OpenAI, { toFile } from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import Together from 'together-ai';
import { z } from 'zod';

const MODEL = 'meta-llama/Llama-3.3-70B-Instruct-Turbo';
const OTHER_MODEL = 'Qwen/Qwen3-235B-A22B-Instruct-2507-tput';
const IMAGE_MODEL = 'black-forest-labs/FLUX.1-schnell';
const SMALL_EMBEDDER = 'togethercomputer/m2-bert-80M-8k-retrieval'; // 768 dimensions
const LARGE_EMBEDDER = 'intfloat/multilingual-e5-large-instruct'; // 1024 dimensions
const OBEDIENCE = true; // tools and structured output exist

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
const CLIENTS = [
  { name: 'together-ai', sdk: Together, client: new Together(settings) },
  { name: 'openai', sdk: OpenAI, client: new OpenAI(settings) },
];
const openai = new OpenAI(settings);

const question = { model: MODEL, messages: [{ role: 'user', content: 'Why is the sky blue?' }] };

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

// The text of each choice of a chat stream, by index.
function joinContent(chunks) {
  const texts = [];
  for (const { index, delta } of chunks.flatMap((chunk) => chunk.choices)) {
    texts[index] = (texts[index] ?? '') + (delta.content ?? '');
  }
  return texts;
}

function assertClose(left, right, tolerance) {
  assert.equal(left.length, right.length);
  left.forEach((value, i) => assert.ok(Math.abs(value - right[i]) <= tolerance, `number ${i}: ${value}, ${right[i]}`));
}

function assertPng(bytes, width, height) {
  assert.deepEqual([...bytes.subarray(0, 8)], [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
  assert.equal(bytes.toString('latin1', 12, 16), 'IHDR');
  assert.deepEqual([bytes.readUInt32BE(16), bytes.readUInt32BE(20)], [width, height]);
}

for (const { name, sdk, client } of CLIENTS) {
  describe(name, () => {
    test('answers a chat, twice the same', async () => {
      const reply = await client.chat.completions.create(question);
      const [choice] = reply.choices;
      assert.equal(reply.object, 'chat.completion');
      assert.equal(reply.model, MODEL);
      assert.equal(choice.message.role, 'assistant');
      assert.equal(choice.finish_reason, 'stop');
      assert.ok(choice.message.content.length > 0);
      const { prompt_tokens, completion_tokens, total_tokens } = reply.usage;
      assert.ok(prompt_tokens > 0 && completion_tokens > 0);
      assert.equal(total_tokens, prompt_tokens + completion_tokens);
      assert.deepEqual(await client.chat.completions.create(question), reply);
    });

    test('answers another question differently', async () => {
      const one = await client.chat.completions.create(question);
      const two = await client.chat.completions.create({
        ...question,
        messages: [{ role: 'user', content: 'Why is the sea green?' }],
      });
      assert.notEqual(two.choices[0].message.content, one.choices[0].message.content);
    });

    test('streams the same chat', async () => {
      const whole = await client.chat.completions.create(question);
      const chunks = await collect(await client.chat.completions.create({ ...question, stream: true }));
      assert.ok(chunks.length > 2);
      assert.ok(chunks.every((chunk) => chunk.object === 'chat.completion.chunk' && chunk.id === chunks[0].id));
      assert.deepEqual(joinContent(chunks), [whole.choices[0].message.content]);
      assert.deepEqual(chunks.findLast((chunk) => chunk.usage).usage, whole.usage);
      const reasons = chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.finish_reason);
      assert.deepEqual(reasons.filter(Boolean), ['stop']);
    });

    test('streams the usage where the engine of the model has it', async () => {
      for (const [model, choices] of [[MODEL, 1], [OTHER_MODEL, 0]]) {
        const chunks = await collect(await client.chat.completions.create({ ...question, model, stream: true }));
        assert.equal(chunks.at(-1).choices.length, choices);
        assert.ok(chunks.at(-1).usage.total_tokens > 0);
        assert.ok(chunks.slice(0, -1).every((chunk) => !chunk.usage));
      }
    });

    test('gives n different choices, whole and streamed', async () => {
      const whole = await client.chat.completions.create({ ...question, n: 2 });
      const texts = whole.choices.map((choice) => choice.message.content);
      assert.deepEqual(whole.choices.map((choice) => choice.index), [0, 1]);
      assert.notEqual(texts[0], texts[1]);
      const stream = await client.chat.completions.create({ ...question, n: 2, stream: true });
      assert.deepEqual(joinContent(await collect(stream)), texts);
    });

    test('cuts at max_tokens and before a stop sequence', async () => {
      const whole = (await client.chat.completions.create(question)).choices[0].message.content;
      const short = await client.chat.completions.create({ ...question, max_tokens: 3 });
      assert.equal(short.choices[0].finish_reason, 'length');
      assert.equal(short.usage.completion_tokens, 3);
      const word = whole.split(' ')[3];
      const stopped = await client.chat.completions.create({ ...question, stop: [word] });
      assert.equal(stopped.choices[0].message.content, whole.slice(0, whole.indexOf(word)));
      assert.equal(stopped.choices[0].finish_reason, 'stop');
    });

    test('completes a prompt, whole and streamed', async () => {
      const request = { model: MODEL, prompt: 'Once upon', max_tokens: 16 };
      const whole = await client.completions.create(request);
      assert.equal(whole.object, 'text.completion');
      assert.equal(whole.usage.completion_tokens, 16);
      assert.equal(whole.choices[0].finish_reason, 'length');
      const chunks = await collect(await client.completions.create({ ...request, stream: true }));
      const texts = chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.text ?? '');
      assert.equal(texts.join(''), whole.choices[0].text);
    });

    test('embeds, with the dimension of the model', async () => {
      for (const [model, dimension] of [['someone/unknown', 768], [SMALL_EMBEDDER, 768], [LARGE_EMBEDDER, 1024]]) {
        const reply = await client.embeddings.create({ model, input: ['a red house', 'a blue car'] });
        assert.deepEqual(reply.data.map((item) => item.index), [0, 1]);
        assert.deepEqual(reply.data.map((item) => item.embedding.length), [dimension, dimension]);
        const length = reply.data[0].embedding.reduce((sum, value) => sum + value * value, 0);
        assert.ok(Math.abs(length - 1) < 1e-3, `squared length ${length}`);
        assert.notDeepEqual(reply.data[0].embedding, reply.data[1].embedding);
      }
    });

    test('draws PNG images of the asked size', async () => {
      const request = { model: IMAGE_MODEL, prompt: 'a lighthouse', n: 2, response_format: 'base64' };
      const reply = await client.images.generate({ ...request, width: 320, height: 256 });
      assert.equal(reply.data.length, 2);
      for (const image of reply.data) assertPng(Buffer.from(image.b64_json, 'base64'), 320, 256);
      assert.notEqual(reply.data[0].b64_json, reply.data[1].b64_json);
    });

    test('serves the image behind its URL', async () => {
      const request = { model: IMAGE_MODEL, prompt: 'a lighthouse', width: 256, height: 256 };
      const reply = await client.images.generate({ ...request, response_format: 'url' });
      assert.ok(reply.data[0].url.startsWith(`${url}/`), reply.data[0].url);
      const response = await fetch(reply.data[0].url);
      assert.equal(response.status, 200);
      assert.equal(response.headers.get('content-type'), 'image/png');
      assertPng(Buffer.from(await response.arrayBuffer()), 256, 256);
    });

    test('raises the class of each error', async () => {
      const noMessages = await raised(client.chat.completions.create({ model: MODEL }));
      assert.ok(noMessages instanceof sdk.BadRequestError);
      assert.match(noMessages.message, /messages/);
      const hot = await raised(client.chat.completions.create({ ...question, temperature: 'hot' }));
      assert.ok(hot instanceof sdk.BadRequestError);
      assert.match(JSON.stringify(hot.error), /"param":"temperature"/);
      const early = await raised(client.chat.completions.create({ ...question, stream: true, n: 0 }));
      assert.ok(early instanceof sdk.BadRequestError);
      const lost = await raised(client.get('/no/such/route'));
      assert.ok(lost instanceof sdk.NotFoundError);
      const stranger = new sdk({ ...settings, defaultHeaders: { Authorization: null } });
      const refused = await raised(stranger.chat.completions.create(question));
      assert.ok(refused instanceof sdk.AuthenticationError, `${refused}`);
    });
  });
}

async function raised(promise) {
  return promise.then(
    () => assert.fail('no error was raised'),
    (error) => error,
  );
}

describe('models', () => {
  test('together-ai gets an array', async () => {
    const models = await CLIENTS[0].client.models.list();
    assert.ok(Array.isArray(models));
    assert.ok(models.every((model) => model.object === 'model' && model.id.includes('/')));
    assert.ok(models.some((model) => model.id === MODEL && model.context_length > 0 && model.pricing.input > 0));
  });

  test('openai gets a page, and one model by an id with a slash', async () => {
    const models = await collect(await openai.models.list());
    assert.ok(models.length > 10);
    const model = await openai.models.retrieve(MODEL);
    assert.equal(model.id, MODEL);
    assert.deepEqual(model, models.find(({ id }) => id === MODEL));
    assert.ok((await raised(openai.models.retrieve('no/such-model'))) instanceof OpenAI.NotFoundError);
  });
});

describe('what only the openai package asks for', () => {
  test('base64 and float embeddings are the same numbers', async () => {
    const request = { model: LARGE_EMBEDDER, input: 'a red house' };
    const decoded = (await openai.embeddings.create(request)).data[0].embedding; // asks for base64
    const floats = (await openai.embeddings.create({ ...request, encoding_format: 'float' })).data[0].embedding;
    assertClose(decoded, floats, 1e-6);
  });

  test('b64_json, and size as text', async () => {
    const reply = await openai.images.generate({
      model: IMAGE_MODEL,
      prompt: 'a lighthouse',
      size: '512x256',
      response_format: 'b64_json',
    });
    assertPng(Buffer.from(reply.data[0].b64_json, 'base64'), 512, 256);
    assert.equal(reply.created, undefined); // as in production
  });

  test('dimensions shorten the vector', async () => {
    const reply = await openai.embeddings.create({ model: LARGE_EMBEDDER, input: 'a red house', dimensions: 64 });
    assert.equal(reply.data[0].embedding.length, 64);
  });

  test('the stream helper puts the whole reply together', async () => {
    const stream = openai.chat.completions.stream(question);
    const folded = await stream.finalChatCompletion();
    const whole = await openai.chat.completions.create(question);
    assert.equal(folded.choices[0].message.content, whole.choices[0].message.content);
    assert.equal(folded.choices[0].finish_reason, 'stop');
  });
});

const weather = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'Get the current weather of a city',
    parameters: {
      type: 'object',
      properties: { city: { type: 'string' }, unit: { enum: ['celsius', 'fahrenheit'] } },
      required: ['city', 'unit'],
      additionalProperties: false,
    },
  },
};
const clock = {
  type: 'function',
  function: {
    name: 'read_clock',
    description: 'Tell the time of a zone',
    parameters: { type: 'object', properties: { zone: { type: 'string' } }, required: ['zone'] },
  },
};
const asking = {
  model: MODEL,
  messages: [{ role: 'user', content: 'What is the weather in the city of Lisbon?' }],
  tools: [weather, clock],
};

function assertWeather(call) {
  assert.equal(call.type, 'function');
  assert.match(call.id, /^call_[0-9a-z]{24}$/);
  assert.equal(call.function.name, 'get_weather');
  const { city, unit, ...rest } = JSON.parse(call.function.arguments);
  assert.equal(typeof city, 'string');
  assert.ok(['celsius', 'fahrenheit'].includes(unit), unit);
  assert.deepEqual(rest, {});
}

const Person = z.object({
  name: z.string(),
  age: z.number().int().min(0).max(120),
  email: z.string().nullable(),
  role: z.enum(['admin', 'guest']),
  addresses: z.array(z.object({ city: z.string(), main: z.boolean() })).min(1),
});

describe('tools and structured output', { skip: !OBEDIENCE }, () => {
  for (const { name, client } of CLIENTS) {
    test(`${name}: a tool that is required, named, or asked for by the words`, async () => {
      const named = { type: 'function', function: { name: 'get_weather' } };
      for (const tool_choice of [named, 'auto', undefined]) {
        const reply = await client.chat.completions.create({ ...asking, tool_choice });
        assert.equal(reply.choices[0].finish_reason, 'tool_calls');
        assertWeather(reply.choices[0].message.tool_calls[0]);
      }
      const required = await client.chat.completions.create({ ...question, tools: [weather], tool_choice: 'required' });
      assertWeather(required.choices[0].message.tool_calls[0]);
      const none = await client.chat.completions.create({ ...asking, tool_choice: 'none' });
      assert.equal(none.choices[0].finish_reason, 'stop');
      assert.ok(none.choices[0].message.content);
    });

    test(`${name}: streamed tool calls are the same`, async () => {
      const whole = await client.chat.completions.create(asking);
      const chunks = await collect(await client.chat.completions.create({ ...asking, stream: true }));
      const calls = chunks.flatMap((chunk) => chunk.choices).flatMap((choice) => choice.delta.tool_calls ?? []);
      const [head, ...fragments] = calls;
      const text = fragments.map((fragment) => fragment.function.arguments).join('');
      assert.equal(head.function.arguments, '');
      const folded = { ...head, function: { ...head.function, arguments: text } };
      assert.deepEqual([folded], whole.choices[0].message.tool_calls);
      assert.equal(chunks.flatMap((chunk) => chunk.choices).at(-1).finish_reason, 'tool_calls');
    });

    test(`${name}: json_schema content parses and fits`, async () => {
      const response_format = zodResponseFormat(Person, 'person');
      const plain = JSON.parse(JSON.stringify(response_format)); // without zod's parser
      const reply = await client.chat.completions.create({ ...question, response_format: plain });
      Person.parse(JSON.parse(reply.choices[0].message.content));
    });
  }

  test('openai: parse returns what zod accepts', async () => {
    const reply = await openai.chat.completions.parse({
      ...question,
      response_format: zodResponseFormat(Person, 'person'),
    });
    Person.parse(reply.choices[0].message.parsed);
  });

  test('openai: a zod function gets its arguments parsed', async () => {
    const reply = await openai.chat.completions.parse({
      ...question,
      tools: [zodFunction({ name: 'save_person', parameters: Person })],
      tool_choice: 'required',
    });
    Person.parse(reply.choices[0].message.tool_calls[0].function.parsed_arguments);
  });

  test('openai: the stream helper sees one whole tool call, done twice as in production', async () => {
    const stream = openai.chat.completions.stream(asking);
    const done = [];
    stream.on('tool_calls.function.arguments.done', (event) => done.push(event));
    const folded = await stream.finalChatCompletion();
    assert.equal(folded.choices[0].finish_reason, 'tool_calls');
    assert.equal(folded.choices[0].message.tool_calls.length, 1);
    assertWeather(folded.choices[0].message.tool_calls[0]);
    assert.deepEqual(done.map((event) => event.name), ['get_weather', 'get_weather']);
  });

  for (const stream of [false, true]) {
    test(`openai: runTools calls a tool and ends by itself, ${stream ? 'streamed' : 'whole'}`, async () => {
      const calls = [];
      const getWeather = (args) => {
        calls.push(args);
        return { degrees: 21, sky: 'clear' };
      };
      const tool = { ...weather, function: { ...weather.function, function: getWeather, parse: JSON.parse } };
      const runner = openai.chat.completions.runTools({ ...asking, tools: [tool], stream });
      const text = await runner.finalContent();
      assert.ok(text.length > 0);
      assert.equal(calls.length, 1);
      assert.equal(typeof calls[0].city, 'string');
      assert.deepEqual(runner.messages.map(({ role }) => role), ['user', 'assistant', 'tool', 'assistant']);
    });
  }
});

// Fetch a job until it has ended; return its last state and every status seen.
async function climb(fetchJob) {
  const seen = [];
  for (;;) {
    const job = await fetchJob();
    seen.push(job.status);
    if (['COMPLETED', 'FAILED'].includes(job.status) || seen.length === 10) return { job, seen };
  }
}

// A silent WAV file: 16 bits, one channel, 8,000 samples a second.
function writeSound(seconds) {
  const data = Buffer.alloc(44 + 16000 * seconds);
  data.write('RIFF', 0);
  data.writeUInt32LE(data.length - 8, 4);
  data.write('WAVEfmt ', 8);
  data.writeUInt32LE(16, 16);
  data.writeUInt16LE(1, 20);
  data.writeUInt16LE(1, 22);
  data.writeUInt32LE(8000, 24);
  data.writeUInt32LE(16000, 28);
  data.writeUInt16LE(2, 32);
  data.writeUInt16LE(16, 34);
  data.write('data', 36);
  data.writeUInt32LE(data.length - 44, 40);
  return data;
}

const readLines = async (id) =>
  (await (await openai.files.content(id)).text()).trim().split('\n').map((line) => JSON.parse(line));

describe('openai: what is stored', () => {
  const questions = ['Why is the sky blue?', 'What do herons eat?'];
  const asked = questions.map((content) => ({ model: MODEL, messages: [{ role: 'user', content }] }));
  const bodies = [...asked, { model: MODEL }]; // the last one is refused
  const rows = bodies.map((body, n) => ({ custom_id: `q${n}`, method: 'POST', url: '/v1/chat/completions', body }));
  const lines = rows.map((row) => `${JSON.stringify(row)}\n`).join('');
  const upload = async () =>
    openai.files.create({ file: await toFile(Buffer.from(lines), 'lines.jsonl'), purpose: 'batch' });

  test('a file is listed, fetched byte for byte and deleted', async () => {
    const file = await upload();
    assert.deepEqual([file.object, file.filename, file.purpose], ['file', 'lines.jsonl', 'batch-api']);
    assert.equal(file.bytes, Buffer.byteLength(lines));
    assert.equal(await (await openai.files.content(file.id)).text(), lines);
    assert.ok((await collect(await openai.files.list())).some(({ id }) => id === file.id));
    assert.equal((await openai.files.retrieve(file.id)).filename, 'lines.jsonl');
    assert.deepEqual(await openai.files.delete(file.id), { id: file.id, object: 'file', deleted: true });
    assert.ok((await raised(openai.files.retrieve(file.id))) instanceof OpenAI.NotFoundError);
  });

  test('a batch answers as chat does, and a bad line is an error line', async () => {
    const { id: input_file_id } = await upload();
    const { job: created } = await openai.batches.create({
      input_file_id,
      endpoint: '/v1/chat/completions',
      completion_window: '24h',
    });
    assert.equal(created.status, 'VALIDATING'); // production's form, not OpenAI's
    const { job, seen } = await climb(() => openai.batches.retrieve(created.id));
    assert.deepEqual(seen, ['IN_PROGRESS', 'COMPLETED']);
    assert.ok((await collect(await openai.batches.list())).some(({ id }) => id === job.id));
    const answers = await readLines(job.output_file_id);
    assert.deepEqual(answers.map((row) => row.custom_id).sort(), ['q0', 'q1']);
    for (const { custom_id, response } of answers) {
      const direct = await openai.chat.completions.create(bodies[custom_id.slice(1)]);
      assert.equal(response.status_code, 200);
      assert.deepEqual(response.body.choices[0].message, direct.choices[0].message);
    }
    const errors = await readLines(job.error_file_id);
    assert.deepEqual(errors.map((row) => row.custom_id), ['q2']);
  });

  test('a batch is cancelled', async () => {
    const { id: input_file_id } = await upload();
    const request = { input_file_id, endpoint: '/v1/chat/completions', completion_window: '24h' };
    const { job } = await openai.batches.create(request);
    assert.equal((await openai.batches.cancel(job.id)).status, 'CANCELLED');
  });
});

describe('openai: audio', () => {
  test('speech as WAV and as MP3', async () => {
    const request = { model: 'cartesia/sonic', voice: 'newsman', input: 'Hello there, friend.' };
    for (const [response_format, type, start] of [['wav', 'audio/wav', 'RIFF'], ['mp3', 'audio/mpeg', '\xff\xfb']]) {
      const reply = await openai.audio.speech.create({ ...request, response_format });
      assert.equal(reply.headers.get('content-type'), type);
      const data = Buffer.from(await reply.arrayBuffer());
      assert.equal(data.toString('latin1', 0, start.length), start);
    }
  });

  test('transcriptions and translations last as long as the sound', async () => {
    const file = await toFile(writeSound(3), 'a.wav');
    const request = { file, model: 'openai/whisper-large-v3' };
    const { text } = await openai.audio.transcriptions.create(request);
    const verbose = { ...request, response_format: 'verbose_json' };
    const full = await openai.audio.transcriptions.create({ ...verbose, timestamp_granularities: ['segment', 'word'] });
    assert.deepEqual([full.text, full.duration], [text, 3]);
    assert.equal(full.words.map(({ word }) => word).join(' '), text);
    assert.equal(full.segments.at(-1).end, 3);
    const translation = await openai.audio.translations.create(verbose);
    assert.ok(translation.text.length > 0);
  });
});
