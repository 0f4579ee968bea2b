// The realtime sockets of together_fake.py with clients of Node, and in a page.
//
//     node voices.mjs      needs ws, undici and playwright-core beside this file
//
// PYTHON is the interpreter (python3), TOGETHER_FAKE the file to serve (together_fake.py), CHROMIUM
// the browser (/usr/bin/chromium).

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createServer } from 'node:http';
import { createInterface } from 'node:readline';
import { after, test } from 'node:test';

import { chromium } from 'playwright-core';
import { WebSocket as UndiciSocket } from 'undici';
import WebSocket from 'ws';

const {
  PYTHON = 'python3',
  TOGETHER_FAKE = 'together_fake.py',
  CHROMIUM = '/usr/bin/chromium',
} = process.env;
const VOICE = '/v1/audio/speech/websocket?voice=af_heart';
const REALTIME = '/v1/realtime?model=openai/whisper-large-v3&input_audio_format=pcm_s16le_16000';
const PROTOCOLS = ['realtime', 'openai-insecure-api-key.SECRET', 'openai-beta.realtime-v1'];
const HELLO_BYTES = 12 * 60 * 48; // of "Hello there."

async function startServer() {
  const server = spawn(PYTHON, [TOGETHER_FAKE, '--port', '0', '--quiet'], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  process.on('exit', () => server.kill());
  for await (const line of createInterface({ input: server.stdout }))
    return { server, url: line.match(/http:\S+$/)[0] };
  throw new Error('the server ended without saying where it listens');
}

const { server, url } = await startServer();
const socketUrl = url.replace('http', 'ws');
after(() => server.kill());

const headers = { Authorization: 'Bearer x' };

async function script(entry) {
  const body = JSON.stringify({ fixtures: [entry] });
  const answer = await fetch(url + '/__parlel/fixtures', { method: 'POST', body });
  assert.equal(answer.status, 200, await answer.text());
}

// Speak a sentence over a socket of the browsers' kind; also run inside of a page.
async function speak(socket) {
  return new Promise((resolve, reject) => {
    let bytes = 0;
    socket.onerror = () => reject(new Error('the socket failed'));
    socket.onclose = event => reject(new Error(`closed with ${event.code}`));
    socket.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      if (event.type === 'session.created')
        for (const text of ['Hello', ' there.'])
          socket.send(JSON.stringify({ type: 'input_text_buffer.append', text }));
      if (event.delta) bytes += atob(event.delta).length;
      if (event.type.endsWith('.done')) {
        socket.onclose = ({ code }) => resolve({ bytes, code, protocol: socket.protocol });
        socket.close(1000);
      }
    };
  });
}

test('ws speaks', async () => {
  const socket = new WebSocket(socketUrl + VOICE, { headers });
  const got = await speak(socket);
  assert.deepEqual(got, { bytes: HELLO_BYTES, code: 1000, protocol: '' });
  assert.equal(socket.extensions, '');
});

test("undici's WebSocket, which is Node's, speaks", async () => {
  const got = await speak(new UndiciSocket(socketUrl + VOICE, { protocols: PROTOCOLS }));
  assert.deepEqual(got, { bytes: HELLO_BYTES, code: 1000, protocol: 'realtime' });
});

test('ws hears, in pieces', async () => {
  const loud = Buffer.alloc(2 * 16000 * 2);
  for (let at = 0; at < loud.length; at += 2)
    loud.writeInt16LE(Math.round(8000 * Math.sin(at / 20)), at);
  const sound = Buffer.concat([loud, Buffer.alloc(32000), loud, Buffer.alloc(32000)]);
  const socket = new WebSocket(socketUrl + REALTIME, PROTOCOLS);
  const texts = [];
  await new Promise((resolve, reject) => {
    socket.on('error', reject);
    socket.on('open', () => {
      for (let at = 0; at < sound.length; at += 8192) {
        const audio = sound.subarray(at, at + 8192).toString('base64');
        socket.send(JSON.stringify({ type: 'input_audio_buffer.append', audio }));
      }
    });
    socket.on('message', data => {
      const event = JSON.parse(data);
      if (event.transcript) texts.push(event.transcript);
      if (texts.length === 2) resolve();
    });
  });
  assert.equal(texts[0], texts[1]); // it is the same sound
  assert.equal(texts[0].split(' ').length, 5);
  socket.close();
});

test('pings, large messages and a refused handshake', async () => {
  const socket = new WebSocket(socketUrl + REALTIME, { headers });
  await new Promise(resolve => socket.once('message', resolve));
  socket.ping('are you there');
  assert.equal(String((await once(socket, 'pong'))[0]), 'are you there');
  socket.send(JSON.stringify({ type: 'echo', payload: 'x'.repeat(3e6) }));
  assert.equal(JSON.parse((await once(socket, 'message'))[0]).payload.length, 3e6);
  socket.send('x'.repeat(5e6));
  assert.equal((await once(socket, 'close'))[0], 1009);
  const refused = new WebSocket(socketUrl + REALTIME);
  const [, answer] = await once(refused, 'unexpected-response');
  assert.equal(answer.statusCode, 401);
  refused.on('error', () => {});
  refused.terminate();
});

function once(socket, name) {
  return new Promise(resolve => socket.once(name, (...args) => resolve(args)));
}

test('a close code is told', async () => {
  await script({ match: { endpoint: 'voice' }, response: { status: 4503 }, times: 1 });
  const socket = new WebSocket(socketUrl + VOICE, { headers });
  const [code, reason] = await once(socket, 'close');
  assert.deepEqual([code, String(reason)], [4503, 'no_healthy_workers']);
});

test('pages', async () => {
  const args = ['--no-sandbox', '--host-resolver-rules=MAP foreign.test 127.0.0.1'];
  const browser = await chromium.launch({ executablePath: CHROMIUM, args });
  const other = createServer((request, answer) => answer.end('<p>another origin</p>'));
  await new Promise(resolve => other.listen(0, '127.0.0.1', resolve));
  try {
    const page = await browser.newPage();
    const run = (address, protocols) =>
      page.evaluate(`(${speak})(new WebSocket(${JSON.stringify(address)}, ${JSON.stringify(protocols)}))
        .catch(error => error.message)`);
    await page.goto(url);
    const heard = { bytes: HELLO_BYTES, code: 1000, protocol: 'realtime' };
    assert.deepEqual(await run(socketUrl + VOICE, PROTOCOLS), heard);
    assert.deepEqual((await run(socketUrl + VOICE + '&api_key=x', [])).bytes, HELLO_BYTES);
    assert.equal(await run(socketUrl + VOICE, []), 'the socket failed');
    await page.goto(`http://foreign.test:${other.address().port}/`);
    assert.deepEqual(await run(socketUrl + VOICE, PROTOCOLS), heard);
    assert.equal(await run(socketUrl + VOICE, ['realtime']), 'the socket failed');
    const list = await (await fetch(url + '/__parlel/requests')).text();
    assert.deepEqual(
      JSON.parse(list).requests.slice(-5).map(call => call.status),
      [101, 101, 401, 101, 403],
    );
    assert.ok(!list.includes('SECRET'));
  } finally {
    other.close();
    await browser.close();
  }
});
