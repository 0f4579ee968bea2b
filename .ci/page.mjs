// The inspection page of together_fake.py in a browser.
//
//     node page.mjs        needs playwright-core beside this file
//
// PYTHON is the interpreter (python3), TOGETHER_FAKE the file to serve (together_fake.py), CHROMIUM
// the browser (/usr/bin/chromium).

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { after, beforeEach, test } from 'node:test';

import { chromium } from 'playwright-core';

const {
  PYTHON = 'python3',
  TOGETHER_FAKE = 'together_fake.py',
  CHROMIUM = '/usr/bin/chromium',
} = process.env;
const MODEL = 'meta-llama/Llama-3.3-70B-Instruct-Turbo';
const TEST_HEADER = 'X-Test-Id'; // carries a test's id
const LONGEST = 200; // ms of one task on the page's thread

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
const browser = await chromium.launch({ executablePath: CHROMIUM, args: ['--no-sandbox'] });
after(async () => {
  await browser.close();
  server.kill();
});

async function send(path, body, headers = {}) {
  const answer = await fetch(url + path, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', Authorization: 'Bearer x', ...headers },
    body: JSON.stringify(body),
  });
  return answer.text();
}

const ask = (content, more = {}, headers = {}) =>
  send('/v1/chat/completions', { model: MODEL, messages: [{ role: 'user', content }], ...more }, headers);

const addFixture = (userMessage, response, more = {}) =>
  send('/__parlel/fixtures', { fixtures: [{ match: { userMessage }, response, ...more }] });

beforeEach(() => send('/__parlel/reset', {}));

// Open the page and run a check on it: whatever happens, nothing may fail in its console, ask
// elsewhere, run a dialog that was not expected, or block the thread.
async function visit(check, options = {}, prepare = async () => {}, at = url) {
  const context = await browser.newContext({ viewport: { width: 1400, height: 800 }, ...options });
  try {
    const page = await context.newPage();
    const troubles = [];
    const requests = [];
    page.on('console', (entry) => entry.type() === 'error' && troubles.push(entry.text()));
    page.on('pageerror', (error) => troubles.push(String(error)));
    page.on('request', (request) => requests.push(request.url()));
    page.on('dialog', (dialog) => {
      if (dialog.type() === 'confirm') return dialog.accept();
      troubles.push(`dialog: ${dialog.message()}`);
      return dialog.dismiss();
    });
    await page.addInitScript(() => {
      window.tasks = [];
      new PerformanceObserver((seen) => {
        window.tasks.push(...seen.getEntries().map((task) => task.duration));
      }).observe({ type: 'longtask' });
    });
    await prepare(page);
    await page.goto(at, { waitUntil: 'load' });
    await page.locator('#state', { hasText: 'live' }).waitFor();
    await check(page, troubles);
    assert.deepEqual(troubles, []);
    assert.deepEqual(requests.filter((asked) => !asked.startsWith(`${at}/`) && !asked.startsWith('data:')), []);
  } finally {
    await context.close();
  }
}

// Wait until the list shows this many calls, and return their texts, newest first.
async function readRows(page, count) {
  await page.waitForFunction(
    (wanted) => document.querySelector('#list').getAttribute('aria-rowcount') === String(wanted + 1),
    count,
    { timeout: 5000 },
  );
  return page.locator('#rows .row').allInnerTexts();
}

const row = (page, number) => page.locator(`#call-${number}`);
const chosen = (page) => page.locator('#rows [aria-selected=true] .number').innerText();

async function open(page, number) {
  await row(page, number).click();
  await page.locator('h2', { hasText: `#${number} ` }).waitFor();
}

// Click a button that copies, and return what it wrote to the clipboard.
async function copy(page, name) {
  await page.evaluate(() => {
    delete window.copied;
    navigator.clipboard.writeText = async (text) => {
      window.copied = text;
    };
  });
  await page.getByLabel(`Copy as ${name}`).click();
  await page.waitForFunction(() => window.copied !== undefined);
  return page.evaluate(() => window.copied);
}

test('calls appear without reloading, newest first', () =>
  visit(async (page) => {
    await page.getByText('No calls yet').waitFor({ state: 'visible' });
    await ask('first');
    const [first] = await readRows(page, 1);
    assert.equal(await page.getByText('No calls yet').isVisible(), false);
    for (const part of ['chat', 'POST /v1/chat/completions', MODEL, '200', ' ms', 'generated', 'complete'])
      assert.ok(first.includes(part), `${part} is not in ${first}`);
    await fetch(`${url}/v1/models`, { headers: { Authorization: 'Bearer x' } });
    assert.match((await readRows(page, 2))[0], /GET \/v1\/models/);
  }));

test('a running call is shown and then updated, in the list and opened, also behind a filter', () =>
  visit(async (page) => {
    await addFixture('slowly', { content: 'At last.' }, { streamingProfile: { ttft: 2500 } });
    const done = ask('slowly', { stream: true });
    await readRows(page, 1);
    await row(page, 1).getByText('running').waitFor();
    await open(page, 1);
    await ask('meanwhile');
    await readRows(page, 2);
    await page.locator('#text').fill('slowly');
    await readRows(page, 1);
    await done;
    await row(page, 1).getByText('200').waitFor();
    await page.locator('.reply', { hasText: 'At last.' }).waitFor();
  }));

test('filters: text, operation, status, test', () =>
  visit(async (page) => {
    await ask('about apples', {}, { [TEST_HEADER]: 'test-apples' });
    await ask('about pears');
    await send('/v1/embeddings', { model: 'm', input: 'apples' });
    await fetch(`${url}/v1/nothing`, { headers: { Authorization: 'Bearer x' } });
    await readRows(page, 4);
    await page.locator('#text').fill('apples');
    await readRows(page, 2);
    await page.locator('#kind').selectOption('chat');
    assert.match((await readRows(page, 1))[0], /^1\s/);
    await page.locator('#text').fill('');
    await readRows(page, 2);
    await page.locator('#kind').selectOption('');
    await page.locator('#status').selectOption('4xx');
    assert.match((await readRows(page, 1))[0], /404/);
    await page.locator('#status').selectOption('200');
    await readRows(page, 3);
    await page.locator('#status').selectOption('');
    await page.locator('#test').fill('test-apples');
    assert.match((await readRows(page, 1))[0], /^1\s/);
    await ask('more', {}, { [TEST_HEADER]: 'test-apples' });
    await ask('other');
    await readRows(page, 2); // new calls go through the filter, too
    await page.locator('#test').fill('test-none');
    await readRows(page, 0);
    assert.match(await page.locator('#empty').innerText(), /No call passes/);
  }));

test('a script in a prompt, a reply, a name or an address stays text', () =>
  visit(async (page) => {
    const attack = '<img src=x onerror="window.ran=1;alert(1)"><script>window.ran=1</script>';
    await addFixture('img', { content: attack, reasoning: attack });
    const image = { type: 'image_url', image_url: { url: 'https://example.com/a.png' } };
    const script = { type: 'image_url', image_url: { url: 'javascript:window.ran=1' } };
    const called = { name: attack, arguments: attack };
    const messages = [
      { role: 'system', content: attack },
      { role: 'assistant', content: null, tool_calls: [{ id: 'c', type: 'function', function: called }] },
      { role: 'tool', tool_call_id: 'c', content: attack },
      { role: 'user', content: [{ type: 'text', text: attack }, image, script] },
    ];
    await send('/v1/chat/completions', { model: attack, messages }, { [TEST_HEADER]: 'x<b>y' });
    await readRows(page, 1);
    await open(page, 1);
    for (const title of ['Raw request', 'Headers', 'Raw reply']) await page.getByText(title, { exact: true }).click();
    assert.ok((await page.locator('.request').textContent()).includes(attack));
    assert.ok((await page.locator('.reply').textContent()).includes(attack));
    assert.ok((await page.locator('.request').textContent()).includes('image: https://example.com/a.png'));
    await page.waitForTimeout(300);
    assert.equal(await page.evaluate(() => window.ran), undefined);
    assert.equal(await page.locator('#detail img, #detail script').count(), 0);
  }));

test('an opened call shows conversation and reply', () =>
  visit(async (page) => {
    const png = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==';
    await addFixture('picture', {
      content: 'It is red.',
      reasoning: 'I look at it.',
      toolCalls: [{ name: 'paint', arguments: { colour: 'red' } }],
    });
    const called = { name: 'look', arguments: '{"at":"sky"}' };
    const tools = ['paint', 'look'].map((name) => ({ type: 'function', function: { name, parameters: {} } }));
    const messages = [
      { role: 'system', content: 'Be exact.' },
      { role: 'assistant', content: null, tool_calls: [{ id: 'call_1', type: 'function', function: called }] },
      { role: 'tool', tool_call_id: 'call_1', content: '{"sky":"blue"}' },
      { role: 'user', content: [
        { type: 'text', text: 'What is in this picture?' },
        { type: 'image_url', image_url: { url: `data:image/png;base64,${png}` } },
      ] },
    ];
    for (const stream of [false, true])
      await send('/v1/chat/completions', { model: 'openai/with-eyes', messages, tools, stream });
    await readRows(page, 2);
    for (const number of [1, 2]) {
      await open(page, number);
      const request = await page.locator('.request').textContent();
      for (const part of ['system', 'Be exact.', 'calls look', '"at": "sky"', 'call_1', '"sky": "blue"', 'picture?'])
        assert.ok(request.includes(part), `${part} is not in ${request}`);
      assert.equal(await page.locator('.request img').evaluate((image) => image.naturalWidth), 1);
      const reply = await page.locator('.reply').textContent();
      for (const part of ['assistant', 'It is red.', 'I look at it.', 'calls paint', '"colour": "red"'])
        assert.ok(reply.includes(part), `${part} is not in ${reply}`);
    }
  }));

test('what is malformed is shown, too', () =>
  visit(async (page) => {
    const bodies = [
      { messages: [null, 5, 'text'] }, { messages: 'hello' }, [1, 2], 'text', 5, null, {},
      { messages: [{ role: { a: 1 }, content: [null, 7, { type: 'odd' }], tool_calls: [null] }] },
      { messages: [{ role: 'user', content: { deep: [[[]]] } }], tools: 'none' },
    ];
    for (const body of bodies) await send('/v1/chat/completions', body);
    await readRows(page, bodies.length);
    for (let number = 1; number <= bodies.length; number++) {
      await open(page, number);
      assert.ok(await page.locator('.request').isVisible());
      assert.ok(await page.locator('.reply').isVisible());
    }
  }));

test('a long call does not block the page', () =>
  visit(async (page) => {
    const words = 'so many words '.repeat(20000);
    const messages = Array.from({ length: 500 }, (_, i) => ({ role: i % 2 ? 'assistant' : 'user', content: `line ${i}` }));
    messages.push({ role: 'user', content: words }, { role: 'user', content: 'x'.repeat(300000) });
    await addFixture('xxx', { content: words });
    await send('/v1/chat/completions', { model: 'm', messages });
    await readRows(page, 1);
    await open(page, 1);
    for (const title of ['Raw request', 'Raw reply']) await page.getByText(title, { exact: true }).click();
    await page.getByText('more characters').first().waitFor();
    const tasks = await page.evaluate(() => window.tasks);
    console.log(`tasks over 50 ms: ${tasks.map(Math.round)}`);
    assert.ok(Math.max(0, ...tasks) <= LONGEST, `a task took ${Math.max(...tasks)} ms`);
  }));

test('a miss shows what differs', () =>
  visit(async (page) => {
    await addFixture('the weather in Rome', { content: 'Sunny.' });
    await ask('the weather in Paris');
    await readRows(page, 1);
    await open(page, 1);
    const misses = await page.locator('.misses').textContent();
    for (const part of ['run time[0]', 'userMessage', 'Rome', 'Paris'])
      assert.ok(misses.includes(part), `${part} is not in ${misses}`);
  }));

test('many misses leave the conversation in sight', () =>
  visit(async (page) => {
    await addFixture('painted', { image: { url: 'https://example.com/a.png' } });
    for (let i = 0; i < 5; i++) await addFixture(`question ${i}`, { content: 'Yes.' });
    await ask('another question');
    await readRows(page, 1);
    await open(page, 1);
    assert.equal(await page.locator('.misses .message').count(), 3);
    assert.ok(await page.getByText('another question').last().evaluate((node) => node.getBoundingClientRect().bottom < innerHeight));
    await page.getByText('More fixtures').click();
    await page.locator('.misses .message').nth(5).waitFor();
    assert.match(await page.locator('.misses').textContent(), /response[^]*"image"/);
  }));

test('other kinds of calls are readable', () =>
  visit(async (page) => {
    await send('/v1/images/generations', { model: 'm', prompt: 'a boat', width: 64, height: 64 });
    await send('/v1/embeddings', { model: 'm', input: ['one', 'two'] });
    await send('/v1/rerank', { model: 'm', query: 'fruit', documents: ['apple', 'car'] });
    await send('/v1/audio/speech', { model: 'm', input: 'Hello.', voice: 'v', response_format: 'wav' });
    await send('/v1/completions', { model: 'm', prompt: 'Once' });
    await fetch(`${url}/v1/nothing`, { headers: { Authorization: 'Bearer x' } });
    await readRows(page, 6);
    await open(page, 1);
    await page.waitForFunction(() => document.querySelector('.reply img')?.naturalWidth > 0);
    await open(page, 2);
    assert.match(await page.locator('.reply').textContent(), /embedding\s*2\s*\d+ numbers/);
    await open(page, 3);
    assert.match(await page.locator('.reply').textContent(), /0\.\d+ {2}#\d[^]*(apple|car)/);
    await open(page, 4);
    await page.waitForFunction(() => document.querySelector('.reply audio')?.duration > 0);
    await page.evaluate(() => document.querySelector('.reply audio').play()); // fails where it is no sound
    await open(page, 5);
    assert.match(await page.locator('.reply').textContent(), /assistant[^]*\w+ \w+/);
    await open(page, 6);
    assert.match(await page.locator('.reply').textContent(), /error/);
  }));

test('a copied fixture answers the same request equally, a copied curl runs', () =>
  visit(async (page) => {
    const first = JSON.parse(await ask("What's this, \"quoted\"?"));
    await readRows(page, 1);
    await open(page, 1);
    assert.match(await copy(page, 'server.reply(...)'), /server\.reply\(/);
    const command = await copy(page, 'curl');
    const told = JSON.parse(execFileSync('bash', ['-c', command], { stdio: ['ignore', 'pipe', 'ignore'] }));
    assert.deepEqual(told.choices, first.choices);
    const copied = JSON.parse(await copy(page, 'fixture'));
    const fixtures = copied.fixtures ?? [copied].flat();
    assert.equal(JSON.parse(await send('/__parlel/fixtures', { fixtures })).ok, true);
    const again = JSON.parse(await ask("What's this, \"quoted\"?"));
    assert.equal(again.choices[0].message.content, first.choices[0].message.content);
    assert.equal(again.choices[0].finish_reason, first.choices[0].finish_reason);
    await page.keyboard.press('Escape'); // the whole row
    assert.match((await readRows(page, 3))[0], /run time\[0\]/);
  }));

test('copying works without the clipboard', () =>
  visit(
    async (page) => {
      await ask('hello');
      await readRows(page, 1);
      await open(page, 1);
      await page.getByLabel('Copy as curl').click();
      assert.match(await page.evaluate(() => window.copied), /^curl /);
      assert.equal(await page.locator('textarea').count(), 0);
    },
    {},
    (page) => page.addInitScript(() => {
      Object.defineProperty(navigator, 'clipboard', { value: undefined });
      document.addEventListener('copy', () => {
        window.copied = document.activeElement.value;
      });
    }),
  ));

test('the keyboard does everything', () =>
  visit(async (page) => {
    for (let i = 1; i <= 60; i++) await ask(`question ${i}`);
    await readRows(page, 60);
    const press = (...keys) => keys.reduce((done, key) => done.then(() => page.keyboard.press(key)), Promise.resolve());
    await press('/');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'text');
    await page.keyboard.type('j/k');
    assert.equal(await page.locator('#text').inputValue(), 'j/k');
    await readRows(page, 0);
    await page.locator('#text').fill('');
    await readRows(page, 60); // and not before: it scrolls to the newest then
    await press('Escape');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'list');
    await press('j', 'j', 'ArrowDown', 'k');
    assert.equal(await chosen(page), '59');
    await press('End');
    assert.equal(await chosen(page), '1');
    assert.ok(await row(page, 1).evaluate((node) => node.getBoundingClientRect().bottom <= window.innerHeight));
    assert.equal(await page.locator('#list').getAttribute('aria-activedescendant'), 'call-1');
    await press('Enter');
    await page.locator('h2', { hasText: '#1 ' }).waitFor();
    await press('k');
    await page.locator('h2', { hasText: '#2 ' }).waitFor();
    await press('Home');
    await page.locator('h2', { hasText: '#60 ' }).waitFor();
    await press('Tab');
    assert.equal(await page.evaluate(() => document.activeElement.ariaLabel), 'Copy as curl');
    await press('Escape');
    assert.equal(await page.locator('#detail').isVisible(), false);
    assert.equal(await page.evaluate(() => document.activeElement.id), 'list');
    await page.setViewportSize({ width: 700, height: 800 });
    await press('Enter');
    await page.locator('h2', { hasText: '#60 ' }).waitFor();
    assert.equal(await page.locator('#list').isVisible(), false); // a narrow window shows one of the two
    assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 700);
    await press('Escape');
    assert.equal(await page.locator('#list').isVisible(), true);
  }));

test('10,000 calls do not block the page', async () => {
  await ask('the first of many');
  const told = await (await fetch(`${url}/__parlel/requests?view=rows&since=0`)).json();
  const sample = told.rows[0];
  const rows = Array.from({ length: 10000 }, (_, i) => ({ ...sample, n: i + 1, test: `test-${i % 50}` }));
  let extra = 0;
  const route = (page) => page.route('**/__parlel/requests?**', async (asked) => {
    const args = new URL(asked.request().url()).searchParams;
    const since = Number(args.get('since'));
    const text = args.get('text') ?? '';
    if (since && !text) rows.push({ ...sample, n: rows.length + 1 }); // it goes on growing
    extra = rows.length - 10000;
    const json = { ...told, last: rows.length, rows: rows.slice(since).filter((each) => String(each.n).includes(text)) };
    if (told.next !== undefined) json.next = rows.length;
    await asked.fulfill({ json });
  });
  await visit(async (page) => {
    const count = () => page.locator('#list').getAttribute('aria-rowcount').then(Number);
    assert.ok(await count() > 10000);
    const loading = await page.evaluate(() => window.tasks.splice(0));
    await page.evaluate(async () => {
      const list = document.querySelector('#list');
      for (let i = 0; i < 120; i++) {
        list.scrollTop += i % 10 ? 400 : 20000;
        await new Promise(requestAnimationFrame);
      }
    });
    assert.ok(await page.locator('#rows .row').count() < 100);
    const before = await page.locator('#rows .row .number').nth(12).innerText();
    await page.locator('#text').pressSequentially('999', { delay: 30 });
    await page.waitForFunction(() => /^19 of/.test(document.querySelector('#count').textContent));
    await page.locator('#text').fill('');
    await page.waitForFunction(() => document.querySelector('#list').ariaRowCount > 10000);
    await page.locator('#list').focus();
    for (let i = 0; i < 30; i++) await page.keyboard.press('PageDown');
    const top = await chosen(page);
    const find = () => page.evaluate(() => document.querySelector('#rows [aria-selected=true]').getBoundingClientRect().top);
    const place = await find();
    const grown = await count();
    await page.waitForFunction((n) => document.querySelector('#list').ariaRowCount > n, grown);
    assert.equal(await find(), place); // new calls do not move what is looked at
    assert.equal(await chosen(page), top);
    const tasks = await page.evaluate(() => window.tasks);
    console.log(`tasks over 50 ms: loading ${loading.map(Math.round)}, then ${tasks.map(Math.round)}; ${extra} calls more`);
    assert.ok(Math.max(0, ...loading, ...tasks) <= LONGEST, `a task took ${Math.max(...loading, ...tasks)} ms`);
    assert.ok(before);
  }, {}, route);
});

test('reset empties the list, a restart loads it again', () =>
  visit(async (page) => {
    await ask('before');
    await readRows(page, 1);
    await open(page, 1);
    await page.locator('#reset').click();
    await readRows(page, 0);
    assert.equal(await page.locator('#detail').isVisible(), false);
    await ask('afterwards');
    await readRows(page, 1);
    await open(page, 1);
    await page.locator('.request', { hasText: 'afterwards' }).waitFor();
  }));

test('a server that is gone is told', async () => {
  const other = await startServer();
  await visit(async (page, troubles) => {
    other.server.kill();
    await page.locator('#state', { hasText: 'disconnected' }).waitFor();
    troubles.length = 0; // the browser reports the failed request itself
  }, {}, undefined, other.url);
});

test('an address with a number opens that call; one that is gone is told', () =>
  visit(async (page, troubles) => {
    await ask('linked');
    await page.evaluate(() => { location.hash = '#1'; });
    await page.locator('.request', { hasText: 'linked' }).waitFor();
    await page.reload();
    await page.locator('.request', { hasText: 'linked' }).waitFor();
    await page.evaluate(() => { location.hash = '#77'; });
    await page.locator('#detail .note.bad').waitFor();
    assert.match(troubles.splice(0).join(), /404/); // the browser reports it itself
  }));

test('it is dark where the user likes that', async () => {
  const colours = [];
  for (const colorScheme of ['light', 'dark'])
    await visit(async (page) => {
      await ask('hello');
      await page.locator('#rows .row').first().click();
      await page.locator('.reply .message').waitFor();
      colours.push(await page.evaluate(() => getComputedStyle(document.body).backgroundColor));
    }, { colorScheme });
  const [light, dark] = colours.map((colour) => Number(colour.match(/\d+/)[0]));
  assert.ok(light > 200 && dark < 60, String(colours));
});

test('it has nothing that its policy forbids, and is plain ASCII', async () => {
  const answer = await fetch(url, { headers: { Accept: 'text/html' } });
  assert.match(answer.headers.get('content-security-policy'), /default-src 'none'/);
  const text = await answer.text();
  for (const word of ['innerHTML', 'outerHTML', 'insertAdjacentHTML', 'document.write', 'eval(', '"""'])
    assert.equal(text.includes(word), false, word);
  assert.equal(text.split('<script').length, 2);
  assert.equal(text.split('<style').length, 2);
  assert.doesNotMatch(text, /<[^>]* (style|on\w+)=/);
  assert.doesNotMatch(text, /[^\x00-\x7f]/);
});
