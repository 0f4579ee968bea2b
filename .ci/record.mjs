// What aimock has recorded is answered by together_fake.py, and the other way round: each records
// the same calls to a server, and the other one answers them from that file alone.
//
//     node record.mjs        needs @copilotkit/aimock beside this file
//
// PYTHON is the interpreter (python3), TOGETHER_FAKE the file to serve (together_fake.py).
//
// Where the two differ on purpose, and what is therefore not compared: how texts are cut in a stream,
// reasoning is `reasoning_content` there, ids, `created`, the engine's own fields, and what aimock's
// recorder leaves out (`LOST` below). together_fake.py has chats in aimock's words, and keeps all else
// as it came (`json`, `raw`), which aimock answers on no route of inference.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { after, describe, test } from 'node:test';

import { LLMock } from '@copilotkit/aimock';

const MODEL = 'meta-llama/Llama-3.3-70B-Instruct-Turbo';
const THINKER = 'openai/gpt-oss-20b';
const KEY = 'key-that-no-file-may-hold-0123456789';
const CHAT = '/v1/chat/completions';

const { PYTHON = 'python3', TOGETHER_FAKE = 'together_fake.py' } = process.env;
const folder = mkdtempSync(join(tmpdir(), 'record-'));
const stops = [() => rmSync(folder, { recursive: true })];
after(async () => {
  for (const stop of stops.reverse()) await stop();
});

async function startServer(...options) {
  const server = spawn(PYTHON, [TOGETHER_FAKE, '--port', '0', '--quiet', ...options], { stdio: ['ignore', 'pipe', 'inherit'] });
  process.on('exit', () => server.kill());
  const stop = () => new Promise((resolve) => (server.exitCode === null ? server.on('exit', resolve) && server.kill() : resolve()));
  stops.push(stop);
  for await (const line of createInterface({ input: server.stdout })) return { url: line.match(/http:\/\/[\d.:]+/)[0], stop };
  throw new Error('together_fake.py ended without saying where it listens');
}

async function startAimock(load = () => {}, options = {}) {
  const aimock = new LLMock({ port: 0, logLevel: 'silent', ...options });
  load(aimock);
  await aimock.start();
  let running = true;
  const stop = async () => running && ((running = false), await aimock.stop());
  stops.push(stop);
  return { url: aimock.url, stop };
}

const ask = (content, more = {}) => [CHAT, { model: MODEL, messages: [{ role: 'user', content }], ...more }];
const tool = (name) => ({ type: 'function', function: { name, parameters: { type: 'object', properties: { city: { type: 'string' } } } } });
const tools = [tool('get_weather'), tool('get_time')];
const bothWays = (name, content, more) => ({
  [name]: [ask(`${content} (whole)`, more)],
  [`${name}, streamed`]: [ask(`${content} (streamed)`, { stream: true, ...more })],
});
const result = [
  { role: 'user', content: 'Weather of Bergen?' },
  { role: 'assistant', content: null, tool_calls: [{ id: 'call_1', type: 'function', function: { name: 'get_weather', arguments: '{}' } }] },
  { role: 'tool', tool_call_id: 'call_1', content: 'Rain.' },
];

function upload() {
  const form = new FormData();
  form.set('model', 'openai/whisper-large-v3');
  form.set('file', new Blob(['RIFF....WAVE']), 'a.wav');
  return form;
}

// name: the calls, one after the other
const CALLS = {
  ...bothWays('a text', 'Why is the sky blue?'),
  ...bothWays('a cut text', 'Tell a long story', { max_tokens: 5 }),
  ...bothWays('a tool', 'Weather of Oslo?', { tools, tool_choice: { type: 'function', function: { name: 'get_weather' } } }),
  ...bothWays('reasoning', 'Think about tides', { model: THINKER }),
  'a tool result': [[CHAT, { model: MODEL, tools, messages: result }]],
  'an error': [ask('no such role', { messages: [{ role: 'user', content: 'refuse me' }], temperature: 'hot' })],
  'a sequence': [ask('again'), ask('again'), ask('again')],
  'an embedding': [['/v1/embeddings', { model: 'm', input: 'red' }]],
  'an image': [['/v1/images/generations', { model: 'black-forest-labs/FLUX.1-schnell', prompt: 'a fox', width: 64, height: 64, response_format: 'base64' }]],
  'speech': [['/v1/audio/speech', { model: 'cartesia/sonic', input: 'Good morning', voice: 'alloy', response_format: 'wav' }]],
  'a transcription': [['/v1/audio/transcriptions', upload()]],
  'a response': [['/v1/responses', { model: THINKER, input: 'Explain rain' }]],
  'a response, streamed': [['/v1/responses', { model: THINKER, input: 'Explain snow', stream: true }]],
};

async function send(url, path, body) {
  const form = body instanceof FormData;
  const response = await fetch(url + path, {
    method: 'POST',
    headers: { Authorization: `Bearer ${KEY}`, ...(form ? {} : { 'Content-Type': 'application/json' }) },
    body: form ? body : JSON.stringify(body),
  });
  const data = Buffer.from(await response.arrayBuffer());
  const type = response.headers.get('content-type')?.split(';')[0];
  return read(response.status, type, data);
}

// What an answer says, in the words that both servers share.
function read(status, type, data) {
  if (type === 'text/event-stream') {
    const events = data.toString().split('\n').filter((line) => line.startsWith('data: {')).map((line) => JSON.parse(line.slice(6)));
    return { status, ...(events[0].type ? readResponse(events.at(-1).response) : readChunks(events)) };
  }
  if (type !== 'application/json') return { status, type, bytes: data.toString('base64') };
  const body = JSON.parse(data);
  if (body.error) return { status, error: body.error.message, type: body.error.type };
  if (body.output) return { status, ...readResponse(body) };
  if (body.text !== undefined) return { status, text: body.text };
  if (body.choices) return { status, ...readMessage(body.choices[0].message), finish: body.choices[0].finish_reason };
  return { status, data: body.data.map(({ embedding, url, b64_json }) => ({ embedding, url, b64_json })) };
}

function readMessage({ content, reasoning, reasoning_content, tool_calls }) {
  const calls = (tool_calls ?? []).map((call) => ({ id: call.id, name: call.function.name, arguments: JSON.parse(call.function.arguments) }));
  return { content: content || '', reasoning: (reasoning ?? reasoning_content) || '', calls };
}

function readChunks(chunks) {
  const choices = chunks.flatMap((chunk) => chunk.choices);
  const join = (key) => choices.map((choice) => choice.delta[key] ?? '').join('');
  const tool_calls = [];
  for (const { id, index, function: made } of choices.flatMap((choice) => choice.delta.tool_calls ?? [])) {
    tool_calls[index] ??= { id, function: { name: made.name, arguments: '' } };
    tool_calls[index].function.arguments += made.arguments ?? '';
  }
  const message = { content: join('content'), reasoning: join('reasoning') + join('reasoning_content'), tool_calls };
  return { ...readMessage(message), finish: choices.findLast((choice) => choice.finish_reason)?.finish_reason };
}

function readResponse({ output, status }) {
  const items = output.filter((item) => item.type === 'message').flatMap((item) => item.content);
  return { text: items.map((item) => item.text).join(''), ended: status };
}

async function askAll(url) {
  const heard = {};
  for (const [name, calls] of Object.entries(CALLS)) {
    heard[name] = [];
    for (const [path, body] of calls) heard[name].push(await send(url, path, body));
  }
  return heard;
}

const service = await startServer();
const file = join(folder, 'ours.json');
const theirs = join(folder, 'theirs');

async function fillSequence() {
  const entries = ['one', 'two', 'three'].map((content) => ({ match: { userMessage: 'again' }, response: { content }, times: 1 }));
  await fetch(`${service.url}/__parlel/fixtures`, { method: 'POST', body: JSON.stringify({ fixtures: entries }) });
}

// What aimock's recorder loses: how an answer ended, reasoning in a stream, a status that it turned
// into 502 on the wire, a whole answer of the Responses API.
const LOST = ['a cut text', 'a cut text, streamed', 'reasoning, streamed', 'an error', 'a response'];

const inWords = (name) => CALLS[name][0][0] === CHAT && name !== 'an error';

// What a server says to all calls; it is stopped then.
async function hear(server) {
  const heard = await askAll(server.url);
  await server.stop();
  return heard;
}

await fillSequence();
const recordedHere = await hear(await startServer('--upstream', service.url, '--record', file));
const saidThere = await hear(await startAimock((mock) => mock.loadFixtureFile(file)));

await fillSequence();
const record = { providers: { openai: service.url }, fixturePath: theirs };
const recordedThere = await hear(await startAimock(() => {}, { record }));
const itsOwnReplay = await hear(await startAimock((mock) => mock.loadFixtureDir(theirs)));
const saidHere = await hear(await startServer('--fixtures', theirs, '--on-miss', 'error'));

describe('aimock answers from what together_fake.py recorded', () => {
  for (const name of Object.keys(CALLS).filter(inWords)) test(name, () => assert.deepEqual(saidThere[name], recordedHere[name]));
  test('a sequence has each of its answers', () => {
    assert.deepEqual(saidThere['a sequence'].map(({ content }) => content), ['one', 'two', 'three']);
  });
  test('the file holds no key', () => assert.ok(!readFileSync(file, 'utf8').includes(KEY)));
});

describe('together_fake.py answers from what aimock recorded', () => {
  for (const name of Object.keys(CALLS)) {
    test(name, () => {
      assert.deepEqual(saidHere[name], itsOwnReplay[name]);
      if (!LOST.includes(name)) assert.deepEqual(saidHere[name], recordedThere[name]);
    });
  }
});
