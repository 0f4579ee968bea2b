// One set of fixture files, served by aimock and by together_fake.py: both answer alike.
//
//     node aimock.mjs        needs @copilotkit/aimock beside this file
//
// PYTHON is the interpreter (python3), TOGETHER_FAKE the file to serve (together_fake.py).
//
// Where the two differ on purpose, and what is therefore not compared: the stream's first chunk is
// a role alone there and carries text here, so that truncateAfterChunks counts from it; reasoning is
// `reasoning_content` there and `reasoning` here, as Together has it; latency delays a whole reply
// here only; what chaos sends is aimock's wording there and Together's here; a fixture without
// `endpoint` whose response is an error serves every kind here, and only chat and embeddings there;
// one whose response does not fit the request's kind is passed over here and is a 500 there; where
// nothing matches, aimock answers 404 and this server makes an answer up; type and code of an error
// that the fixture leaves out; a null `param`; a tool call is one delta here, several there;
// audio as an object is not served by aimock's speech; an endpoint that the response cannot serve is
// refused here when the file is loaded.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { after, describe, test } from 'node:test';

import { LLMock } from '@copilotkit/aimock';

const PIXEL =
  'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==';
const ALPHABET = 'abcdefghijklmnopqrstuvwxyz';
const SEARCH = { name: 'search', arguments: { query: 'tides', limit: 3 } };
const PAY = { name: 'pay', arguments: '{"amount": 5}', id: 'call_pay' };
const USAGE = { prompt_tokens: 7, completion_tokens: 3 };
const ENVELOPE = { id: 'chatcmpl-1', created: 1234567890, model: 'renamed', finishReason: 'length', role: 'assistant' };

const says = (match, content, options) => ({ match, response: { content }, ...options });
const hears = (userMessage, response, options) => ({ match: { userMessage }, response, ...options });
const paints = (prompt, response) => ({ match: { userMessage: prompt, endpoint: 'image' }, response });

// Entries that share an opening word belong to one case below; the order matters within a word.
const FIXTURES = [
  // The request's messages
  says({ userMessage: 'case-sensitive Word' }, 'found'),
  says({ userMessage: 'parts joined' }, 'joined'),
  says({ userMessage: 'first of two' }, 'the earlier'),
  says({ userMessage: 'first of' }, 'the later'),
  says({ userMessage: 'system', systemMessage: ['Ada', 'metric'] }, 'both texts'),
  says({ userMessage: 'system', systemMessage: 'Ada' }, 'one text'),
  says({ userMessage: 'system', systemMessage: 'pirate' }, 'another'),
  says({ userMessage: 'regex a.c' }, 'literally'),
  // Its other fields
  says({ userMessage: 'which model', model: 'gpt-4o' }, 'the dated one'),
  says({ userMessage: 'which model', model: 'acme/large' }, 'the full id'),
  says({ userMessage: 'which format', responseFormat: 'json_object' }, { ok: true, list: [1, 'two'] }),
  says({ userMessage: 'which format', responseFormat: 'text' }, 'plain'),
  says({ userMessage: 'which tool', toolName: 'search' }, 'searching'),
  says({ userMessage: 'which tool', toolName: 'searching' }, 'never'),
  says({ userMessage: 'which context', context: 'staging' }, 'in staging'),
  says({ userMessage: 'which context' }, 'anywhere'),
  { match: { userMessage: 'which endpoint', endpoint: 'embedding' }, response: { embedding: [0] } },
  says({ userMessage: 'which endpoint', endpoint: 'chat' }, 'chat'),
  // Tool results
  says({ userMessage: 'order', toolCallId: 'call_pay', toolResultContains: 'refused' }, 'It was refused.'),
  says({ userMessage: 'order', toolCallId: 'call_pay' }, 'It is paid.'),
  { match: { userMessage: 'order', hasToolResult: true }, response: { toolCalls: [PAY] } },
  { match: { userMessage: 'order', hasToolResult: false }, response: { toolCalls: [SEARCH] } },
  // Turns and sequences
  says({ userMessage: 'turn', turnIndex: 0 }, 'opening'),
  says({ userMessage: 'turn', turnIndex: 2 }, 'third'),
  says({ userMessage: 'turn' }, 'any turn, loaded last'),
  says({ userMessage: 'tie' }, 'any turn, loaded first'),
  says({ userMessage: 'tie', turnIndex: 1 }, 'second turn'),
  says({ userMessage: 'ahead', turnIndex: 5 }, 'sixth turn'),
  says({ userMessage: 'ahead', turnIndex: 3 }, 'fourth turn'),
  says({ userMessage: 'again', sequenceIndex: 0 }, 'once'),
  hears('again', { error: { message: 'Not twice' }, status: 503 }),
  says({ userMessage: 'count', sequenceIndex: 0 }, 'zero'),
  says({ userMessage: 'count', sequenceIndex: 1 }, 'one'),
  says({ userMessage: 'count', sequenceIndex: 3 }, 'three, which never comes'),
  says({ userMessage: 'count' }, 'many'),
  says({ userMessage: 'pair', model: 'm', sequenceIndex: 0 }, 'm zero'),
  says({ userMessage: 'pair', model: 'other', sequenceIndex: 0 }, 'other zero'),
  says({ userMessage: 'pair', sequenceIndex: 0 }, 'either zero'),
  says({ userMessage: 'pair' }, 'pair over'),
  // Responses
  hears('an object', { content: { city: 'Paris', tags: ['a', { b: null }] } }),
  hears('a list', { content: [1, 'two', { three: 3 }] }),
  hears('unicode', { content: 'Ünï – 漢字 🙂\n"quoted"' }),
  hears('thinking', { content: 'Therefore.', reasoning: 'Because of this and that.' }),
  hears('two tools', { toolCalls: [SEARCH, PAY] }),
  hears('text and tools', { content: 'One moment.', toolCalls: [PAY] }),
  hears('blocks', { blocks: [{ type: 'toolCall', ...PAY }, { type: 'text', text: 'Done.' }] }),
  hears('only texts', { blocks: [{ type: 'text', text: 'Half ' }, { type: 'text', text: 'and half.' }] }),
  hears('envelope', { content: 'Overridden.', usage: USAGE, ...ENVELOPE }),
  hears('error', { error: { message: 'Slow down', type: 'rate_limit_error', code: 'slow' }, status: 429, retryAfter: 3 }),
  hears('how long', { error: { message: 'Wait', type: 'rate_limit_error', code: 'wait' }, status: 429 }),
  hears('broken', { error: { message: 'It broke', type: 'server_error', param: 'model', code: 'broken' } }),
  hears('elsewhere', { content: 'Foreign keys.', systemFingerprint: 'fp', webSearches: ['x'] }, { metadata: { by: 'hand' } }),
  // Options
  hears('pieces', { content: ALPHABET }, { chunkSize: 5 }),
  hears('truncated', { content: ALPHABET }, { chunkSize: 2, latency: 5, truncateAfterChunks: 4 }),
  hears('disconnected', { content: ALPHABET }, { chunkSize: 1, latency: 30, disconnectAfterMs: 100 }),
  hears('slow', { content: ALPHABET }, { chunkSize: 13, latency: 40 }),
  hears('profile', { content: ALPHABET }, { chunkSize: 13, latency: 5000, streamingProfile: { ttft: 80, tps: 50, jitter: 0 } }),
  hears('recorded', { content: ALPHABET }, {
    chunkSize: 13,
    recordedTimings: { ttftMs: 160, interChunkDelaysMs: [40, 40], totalDurationMs: 240 },
    replaySpeed: 2,
  }),
  hears('dropped', { content: 'never' }, { chaos: { dropRate: 1 } }),
  hears('limited', { content: 'never' }, { chaos: { rateLimitRate: 1 } }),
  hears('malformed', { content: 'never' }, { chaos: { malformedRate: 1 } }),
  hears('cut', { content: 'never' }, { chaos: { disconnectRate: 1 } }),
  hears('calm', { content: 'late' }, {
    chaos: { dropRate: 0, malformedRate: 0, rateLimitRate: 0, disconnectRate: 0, latencyMs: 60 },
  }),
  // Other endpoints
  { match: { inputText: 'red green' }, response: { embedding: [0.25, -0.5, 1] } },
  { match: { inputText: 'blue', model: 'acme/embed', endpoint: 'embedding' }, response: { embedding: [1, 2] } },
  { match: { inputText: 'forbidden', endpoint: 'embedding' }, response: { error: { message: 'No', type: 'x', code: 'y' }, status: 403 } },
  { match: { inputText: 'counted', sequenceIndex: 0 }, response: { embedding: [0] } },
  { match: { inputText: 'counted', sequenceIndex: 1 }, response: { embedding: [1] } },
  { match: { userMessage: 'a fox' }, response: { image: { url: 'http://127.0.0.1/fox.png' } } },
  paints('a hen', { image: { b64Json: PIXEL, revisedPrompt: 'a brown hen' } }),
  paints('two cats', { images: [{ url: 'http://127.0.0.1/1.png' }, { url: 'http://127.0.0.1/2.png' }] }),
  paints('a secret', { error: { message: 'Not this', type: 'x', code: 'y' }, status: 400 }),
  { match: { endpoint: 'speech', userMessage: 'good morning' }, response: { audio: 'UklGRg==', format: 'wav' } },
  { match: { endpoint: 'speech' }, response: { audio: 'SGVsbG8=' } },
  {
    match: { endpoint: 'transcription' },
    response: { transcription: { text: 'Ahoy there.', language: 'en', duration: 1.5, words: [{ word: 'Ahoy', start: 0, end: 1 }], segments: [] } },
  },
  { match: { endpoint: 'translation' }, response: { transcription: { text: 'Good day.' } } },
  { match: { endpoint: 'video' }, response: { video: { id: 'video-7', status: 'completed', url: 'http://127.0.0.1/v.mp4' } } },
  { match: { endpoint: 'fal' }, response: { json: { of: 'another provider' } } },
];
const SECOND_FILE = [says({ userMessage: 'folder' }, 'files come first')];
const SUB_FOLDER = [says({ userMessage: 'folder' }, 'folders come later'), says({ endpoint: 'chat', hasToolResult: false }, 'Nothing else matched.')];
assert.ok(FIXTURES.length >= 30);

const folder = mkdtempSync(join(tmpdir(), 'aimock-'));
const write = (name, fixtures) => writeFileSync(join(folder, name), JSON.stringify({ fixtures }));
mkdirSync(join(folder, 'a'));
write('main.json', FIXTURES);
write('second.json', SECOND_FILE);
write(join('a', 'last.json'), SUB_FOLDER);

const { PYTHON = 'python3', TOGETHER_FAKE = 'together_fake.py' } = process.env;
const server = spawn(PYTHON, [TOGETHER_FAKE, '--port', '0', '--quiet', '--fixtures', folder], {
  stdio: ['ignore', 'pipe', 'inherit'],
});
process.on('exit', () => server.kill());
const aimock = new LLMock({ port: 0, logLevel: 'silent' });
aimock.loadFixtureDir(folder);
await aimock.start();
const SERVERS = { aimock: aimock.url, together_fake: await readUrl(server.stdout) };
after(async () => {
  await aimock.stop();
  server.kill();
  rmSync(folder, { recursive: true });
});

async function readUrl(output) {
  for await (const line of createInterface({ input: output })) {
    const found = line.match(/http:\/\/127\.0\.0\.1:\d+/);
    if (found) return found[0];
  }
  throw new Error('together_fake.py ended without saying where it listens');
}

// What came back: status, retry-after, bytes, whether the connection broke, and when parts came.
async function send(url, path, body, headers = {}) {
  const began = performance.now();
  const got = { text: '', cut: false, times: [] };
  const form = body instanceof FormData;
  const type = form ? {} : { 'Content-Type': 'application/json' };
  try {
    const response = await fetch(url + path, {
      method: 'POST',
      headers: { Authorization: 'Bearer parlel-together', ...type, ...headers },
      body: form ? body : JSON.stringify(body),
    });
    got.status = response.status;
    got.retryAfter = response.headers.get('retry-after');
    got.type = response.headers.get('content-type');
    const decoder = new TextDecoder();
    for await (const part of response.body) {
      got.times.push(performance.now() - began);
      got.text += decoder.decode(part, { stream: true });
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    got.cut = true;
  }
  got.elapsed = performance.now() - began;
  return got;
}

const parse = (text) => {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
};

// One chat answer, whole or streamed, in the words that both servers share.
function readChat(got, streamed) {
  const seen = { status: got.status, cut: got.cut };
  const body = parse(got.text);
  if (got.status !== 200) return { ...seen, error: body?.error, retryAfter: got.retryAfter };
  if (!streamed) {
    const [choice] = body?.choices ?? [];
    const calls = choice?.message.tool_calls?.map((call) => ({ id: call.id, ...call.function }));
    return { ...seen, ...readMessage(choice?.message, calls), finish: choice?.finish_reason, envelope: body };
  }
  const events = got.text.split('\n\n').filter((event) => event.startsWith('data: '));
  const chunks = events.map((event) => parse(event.slice(6))).filter(Boolean);
  const choices = chunks.flatMap((chunk) => chunk.choices);
  const calls = [];
  for (const { id, index, function: made } of choices.flatMap((choice) => choice.delta.tool_calls ?? [])) {
    calls[index] ??= { id, name: made.name, arguments: '' };
    calls[index].arguments += made.arguments ?? '';
  }
  const join = (key) => choices.map((choice) => choice.delta[key] ?? '').join('');
  const message = { content: join('content'), reasoning: join('reasoning') + join('reasoning_content') };
  return {
    ...seen,
    ...readMessage(message, calls),
    finish: choices.findLast((choice) => choice.finish_reason)?.finish_reason,
    pieces: choices.map((choice) => choice.delta.content).filter(Boolean),
    firsts: { text: choices.findIndex(({ delta }) => delta.content), call: choices.findIndex(({ delta }) => delta.tool_calls) },
    done: got.text.trimEnd().endsWith('data: [DONE]'),
    envelope: { ...chunks[0], usage: chunks.findLast((chunk) => chunk.usage)?.usage },
  };
}

function readMessage(message, calls = []) {
  const reasoning = message?.reasoning ?? message?.reasoning_content;
  return { content: message?.content || '', reasoning: reasoning || '', calls };
}

async function askBoth(path, body, headers) {
  const both = Object.values(SERVERS).map((url) => send(url, path, body, headers));
  return Promise.all(both);
}

const turns = (...messages) =>
  messages.map((message) => (typeof message === 'string' ? { role: 'user', content: message } : message));
const assistant = (content) => ({ role: 'assistant', content });
const system = (content) => ({ role: 'system', content });
const called = (id) => ({
  role: 'assistant',
  content: null,
  tool_calls: [{ id, type: 'function', function: { name: 'search', arguments: '{}' } }],
});
const result = (id, content) => ({ role: 'tool', tool_call_id: id, content });
const tool = (name) => ({ type: 'function', function: { name, parameters: { type: 'object', properties: {} } } });

// Ask both for a chat and see that they say the same; `wanted` is a part of what they shall say.
async function compare(messages, wanted, { stream = false, headers, ...fields } = {}) {
  const list = turns(...(Array.isArray(messages) ? messages : [messages]));
  const body = { model: 'm', messages: list, stream, ...fields };
  const [theirs, ours] = (await askBoth('/v1/chat/completions', body, headers)).map((got) => readChat(got, stream));
  const pick = (from, keys) => Object.fromEntries(keys.map((key) => [key, from[key]]));
  const shared = ['status', 'cut', 'content', 'reasoning', 'finish', 'done', 'retryAfter'];
  assert.deepEqual(pick(ours, shared), pick(theirs, shared));
  const named = (seen) => seen.calls?.map(({ name, arguments: text }) => ({ name, arguments: text }));
  assert.deepEqual(named(ours), named(theirs));
  if (theirs.error) {
    const { message, type, code } = ours.error;
    assert.deepEqual([message, type, code ?? null], [theirs.error.message, theirs.error.type, theirs.error.code ?? null]);
  }
  const expected = typeof wanted === 'string' ? { content: wanted } : wanted;
  assert.deepEqual(pick(ours, Object.keys(expected)), expected);
  return { theirs, ours };
}

// The same case twice: whole, then streamed.
function bothWays(name, messages, wanted, fields) {
  test(name, async () => {
    await compare(messages, wanted, fields);
    await compare(messages, wanted, { ...fields, stream: true });
  });
}

describe('match', () => {
  bothWays('a text within the last user message', 'a case-sensitive Word here', 'found');
  bothWays('not in another case', 'a CASE-sensitive word here', 'Nothing else matched.');
  bothWays('text parts are joined', [{ role: 'user', content: [{ type: 'text', text: 'parts ' }, { type: 'text', text: 'joined' }] }], 'joined');
  bothWays('only the last user message counts', ['a case-sensitive Word', assistant('x'), 'and so on'], 'Nothing else matched.');
  bothWays('the first loaded wins', 'first of two', 'the earlier');
  bothWays('the second where the first differs', 'first of all', 'the later');
  bothWays('each of the system texts', [system('I am Ada.'), system('Use metric units.'), 'system'], 'both texts');
  bothWays('a system text', [system('I am Ada.'), 'system'], 'one text');
  bothWays('another system text', [system('You are a pirate.'), 'system'], 'another');
  bothWays('no system text', ['system'], 'Nothing else matched.');
  bothWays('a text is no expression', 'regex abc', 'Nothing else matched.');
  bothWays('a text with special characters', 'regex a.c', 'literally');
  bothWays('a model', 'which model', 'the dated one', { model: 'gpt-4o' });
  bothWays('a dated model', 'which model', 'the dated one', { model: 'gpt-4o-2024-08-06' });
  bothWays('not a longer name', 'which model', 'Nothing else matched.', { model: 'gpt-4o-mini' });
  bothWays('a full id', 'which model', 'the full id', { model: 'acme/large' });
  bothWays('a response format', 'which format', '{"ok":true,"list":[1,"two"]}', { response_format: { type: 'json_object' } });
  bothWays('another response format', 'which format', 'plain', { response_format: { type: 'text' } });
  bothWays('no response format', 'which format', 'Nothing else matched.');
  bothWays('a tool', 'which tool', 'searching', { tools: [tool('read'), tool('search')] });
  bothWays('no such tool', 'which tool', 'Nothing else matched.', { tools: [tool('read')] });
  bothWays('a context', 'which context', 'in staging', { headers: { 'X-AIMock-Context': 'staging' } });
  bothWays('another context', 'which context', 'anywhere', { headers: { 'X-AIMock-Context': 'live' } });
  bothWays('an endpoint', 'which endpoint', 'chat');
  bothWays('a folder: files before sub-folders', 'folder', 'files come first');
});

describe('sequences', () => {
  bothWays('an agent: no result', ['order'], { finish: 'tool_calls', content: '' });
  bothWays('an agent: another result', ['order', called('call_1'), result('call_1', 'tides')], { finish: 'tool_calls' });
  bothWays('an agent: the result', ['order', called('call_pay'), result('call_pay', 'ok')], 'It is paid.');
  bothWays('an agent: a bad result', ['order', called('call_pay'), result('call_pay', 'refused')], 'It was refused.');
  bothWays('an agent: a result of an earlier turn', ['order', called('call_pay'), result('call_pay', 'ok'), assistant('x'), 'order again'], {
    finish: 'tool_calls',
  });
  bothWays('the exact turn', 'turn', 'opening');
  bothWays('between turns: the latest reached', ['turn', assistant('x'), 'turn'], 'opening');
  bothWays('a later turn', ['turn', assistant('x'), assistant('y'), 'turn'], 'third');
  bothWays('after the last turn', ['turn', assistant('x'), assistant('y'), assistant('z'), 'turn'], 'third');
  bothWays('an earlier fixture without a turn', ['tie', assistant('x'), 'tie'], 'any turn, loaded first');
  bothWays('but not after that turn', ['tie', assistant('x'), assistant('y'), 'tie'], 'second turn');
  bothWays('all turns ahead: the lowest', ['ahead', called('call_1'), result('call_1', 'x')], 'fourth turn');
  test('counts what was served', async () => {
    for (const wanted of ['zero', 'one', 'many', 'many']) await compare('count', wanted);
  });
  test('counts streams too', async () => {
    await compare('again', 'once', { stream: true });
    await compare('again', { status: 503 }, { stream: true });
    await compare('again', { status: 503 });
  });
  test('counts equal matches together, others apart', async () => {
    const asked = ['m', 'm', 'm', 'other', 'other'];
    for (const [at, wanted] of ['m zero', 'either zero', 'pair over', 'other zero', 'pair over'].entries()) {
      await compare('pair', wanted, { model: asked[at] });
    }
  });
});

describe('responses', () => {
  bothWays('an object is sent as JSON', 'an object', '{"city":"Paris","tags":["a",{"b":null}]}');
  bothWays('a list is sent as JSON', 'a list', '[1,"two",{"three":3}]');
  bothWays('unicode', 'unicode', 'Ünï – 漢字 🙂\n"quoted"');
  bothWays('reasoning', 'thinking', { content: 'Therefore.', reasoning: 'Because of this and that.', finish: 'stop' });
  bothWays('tool calls', 'two tools', { content: '', finish: 'tool_calls' });
  bothWays('text and tool calls', 'text and tools', { content: 'One moment.', finish: 'tool_calls' });
  bothWays('blocks', 'blocks', { content: 'Done.', finish: 'tool_calls' });
  bothWays('blocks of text', 'only texts', { content: 'Half and half.', finish: 'stop' });
  bothWays('keys of other providers are passed over', 'elsewhere', 'Foreign keys.');
  test('the arguments and the id of a tool call', async () => {
    for (const stream of [false, true]) {
      const { theirs, ours } = await compare('two tools', {}, { stream });
      for (const { calls } of [theirs, ours]) {
        assert.deepEqual(calls.map((call) => call.name), ['search', 'pay']);
        assert.deepEqual(JSON.parse(calls[0].arguments), { query: 'tides', limit: 3 });
        assert.equal(calls[1].arguments, '{"amount": 5}');
        assert.equal(calls[1].id, 'call_pay');
        assert.ok(calls[0].id);
      }
    }
  });
  test('blocks are streamed in their order', async () => {
    const { theirs, ours } = await compare('blocks', {}, { stream: true });
    for (const { firsts } of [theirs, ours]) assert.ok(firsts.call >= 0 && firsts.call < firsts.text);
  });
  test('the envelope is overridden', async () => {
    for (const stream of [false, true]) {
      const fields = stream ? { stream, stream_options: { include_usage: true } } : {};
      const { theirs, ours } = await compare('envelope', { content: 'Overridden.', finish: 'length' }, fields);
      for (const [who, { envelope }] of Object.entries({ theirs, ours })) {
        const { id, created, model, usage } = envelope;
        assert.deepEqual([id, created, model], ['chatcmpl-1', 1234567890, 'renamed']);
        assert.deepEqual([usage.prompt_tokens, usage.completion_tokens, usage.total_tokens], [7, 3, 10], who);
      }
    }
  });
  bothWays('an error with a status', 'error', { status: 429, retryAfter: '3' });
  bothWays('a rate limit that says when', 'how long', { status: 429, retryAfter: '1' });
  bothWays('an error without a status', 'broken', { status: 500 });
});

describe('options', () => {
  test('chunkSize', async () => {
    const { theirs, ours } = await compare('pieces', ALPHABET, { stream: true });
    assert.deepEqual(ours.pieces, ['abcde', 'fghij', 'klmno', 'pqrst', 'uvwxy', 'z']);
    assert.deepEqual(theirs.pieces, ours.pieces);
  });
  for (const word of ['truncated', 'disconnected']) {
    test(`${word} streams break`, async () => {
      const body = { model: 'm', messages: turns(word), stream: true };
      for (const got of await askBoth('/v1/chat/completions', body)) {
        const seen = readChat(got, true);
        assert.deepEqual([seen.status, seen.cut, seen.done], [200, true, false]);
        assert.ok(ALPHABET.startsWith(seen.content) && seen.content.length < ALPHABET.length);
      }
      await compare(word, ALPHABET);
    });
  }
  for (const [word, first, last] of [['slow', 40, 120], ['profile', 80, 120], ['recorded', 80, 120]]) {
    test(`${word}: chunks keep their times`, async () => {
      const body = { model: 'm', messages: turns(word), stream: true };
      for (const got of await askBoth('/v1/chat/completions', body)) {
        assert.equal(readChat(got, true).content, ALPHABET);
        assert.ok(got.times[0] >= first - 2 && got.elapsed >= last - 4 && got.elapsed < 2000, `${got.times}`);
      }
    });
  }
  test('chaos', async () => {
    const wanted = { dropped: [500, false], limited: [429, false], malformed: [200, false], cut: [undefined, true] };
    for (const [word, expected] of Object.entries(wanted)) {
      for (const got of await askBoth('/v1/chat/completions', { model: 'm', messages: turns(word) })) {
        assert.deepEqual([got.status, got.cut], expected, word);
        if (word === 'malformed') assert.equal(parse(got.text), undefined);
      }
    }
  });
  test('rates of 0 leave the latency', async () => {
    const body = { model: 'm', messages: turns('calm') };
    for (const got of await askBoth('/v1/chat/completions', body)) {
      assert.equal(readChat(got).content, 'late');
      assert.ok(got.elapsed >= 58);
    }
  });
});

describe('other endpoints', () => {
  const embed = async (input, model = 'm') =>
    (await askBoth('/v1/embeddings', { model, input })).map((got) => {
      const body = parse(got.text);
      const data = body.data?.map(({ index, embedding }) => ({ index, embedding }));
      return { status: got.status, data, message: body.error?.message, code: body.error?.code };
    });
  test('embeddings', async () => {
    const [theirs, ours] = await embed(['red', 'green']);
    assert.deepEqual(ours, theirs);
    assert.deepEqual(ours.data.map((row) => row.embedding), [[0.25, -0.5, 1], [0.25, -0.5, 1]]);
    for (const [input, model] of [['red green', 'm'], ['dark blue', 'acme/embed']]) {
      const [left, right] = await embed(input, model);
      assert.deepEqual(right, left);
      assert.equal(right.data.length, 1);
    }
  });
  test('embeddings that fail', async () => {
    const [theirs, ours] = await embed('forbidden');
    assert.deepEqual(ours, theirs);
    assert.deepEqual([ours.status, ours.message], [403, 'No']);
  });
  test('embeddings in sequence', async () => {
    for (const wanted of [0, 1]) {
      const both = await embed('counted');
      for (const seen of both) assert.deepEqual(seen.data[0].embedding, [wanted]);
    }
  });
  const paint = async (prompt) =>
    (await askBoth('/v1/images/generations', { model: 'm', prompt })).map((got) => {
      const body = parse(got.text);
      const data = body.data?.map(({ url, b64_json, revised_prompt }) => ({ url, b64_json, revised_prompt }));
      return { status: got.status, data, message: body.error?.message };
    });
  for (const prompt of ['a fox', 'a hen', 'two cats', 'a secret']) {
    test(`image: ${prompt}`, async () => {
      const [theirs, ours] = await paint(prompt);
      assert.deepEqual(JSON.parse(JSON.stringify(ours)), JSON.parse(JSON.stringify(theirs)));
    });
  }
  test('speech', async () => {
    for (const [input, text, type] of [['good morning', 'RIFF', 'audio/wav'], ['hush', 'Hello', undefined]]) {
      for (const got of await askBoth('/v1/audio/speech', { model: 'm', input, voice: 'alloy' })) {
        assert.deepEqual([got.status, got.text], [200, text]);
        if (type) assert.equal(got.type, type);
      }
    }
  });
  test('transcription and translation', async () => {
    for (const [path, text] of [['transcriptions', 'Ahoy there.'], ['translations', 'Good day.']]) {
      const form = new FormData();
      form.set('model', 'openai/whisper-large-v3');
      form.set('file', new Blob(['RIFF....WAVE']), 'a.wav');
      for (const got of await askBoth(`/v1/audio/${path}`, form)) {
        assert.deepEqual([got.status, parse(got.text)?.text], [200, text]);
      }
    }
  });
  test('video', async () => {
    const paths = { aimock: '/v1/videos', together_fake: '/v2/videos' };
    for (const [name, url] of Object.entries(SERVERS)) {
      const got = await send(url, paths[name], { model: 'm', prompt: 'a wave' });
      assert.deepEqual([got.status, parse(got.text).id], [200, 'video-7']);
    }
  });
});
