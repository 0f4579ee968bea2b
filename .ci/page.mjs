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
const LONGEST = 200; // ms of one task on the page's thread; more where the machine is busy
const PNG =
  'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==';

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
    await page.locator('#state', { hasText: 'calls' }).waitFor();
    await check(page, troubles);
    assert.deepEqual(troubles, []);
    assert.deepEqual(requests.filter((asked) => !asked.startsWith(`${at}/`) && !asked.startsWith('data:')), []);
  } finally {
    await context.close();
  }
}

// Check that no task took longer than this, or than ten times what a fixed piece of work of some
// 20 ms usually takes now: beside a load everything takes longer.
async function checkTasks(page, tasks, longest) {
  const yardstick = await page.evaluate(() => {
    const rounds = Array.from({ length: 20 }, () => {
      const began = performance.now();
      let sum = 0;
      for (let i = 0; i < 20_000_000; i++) sum += i & 7;
      return sum && performance.now() - began;
    });
    return rounds.sort((a, b) => a - b)[10];
  });
  const worst = Math.max(0, ...tasks);
  console.log(`tasks over 50 ms: ${tasks.map(Math.round)}; the yardstick: ${Math.round(yardstick)}`);
  assert.ok(worst <= Math.max(longest, 10 * yardstick), `a task took ${worst} ms`);
}

// Wait until the list shows this many calls, and return their texts, newest first.
async function readRows(page, count) {
  await page.waitForFunction(
    (wanted) => document.querySelectorAll('.row').length === wanted,
    count,
    { timeout: 30000 },
  );
  return page.locator('.row').allInnerTexts();
}

const row = (page, number) => page.locator(`#call-${number}`);
const focused = (page) => page.evaluate(() => document.activeElement.id);
const side = (page, name) => page.locator(`.sides > section:has(h3:text-is("${name}"))`);

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
  await page.getByText(`Copy ${name}`).click();
  await page.waitForFunction(() => window.copied !== undefined);
  return page.evaluate(() => window.copied);
}

test('an empty record says what to do, and it works', () =>
  visit(async (page) => {
    const text = await page.locator('#list pre').innerText();
    assert.match(text, /export TOGETHER_BASE_URL=http:\S+\/v1 TOGETHER_API_KEY=/);
    const command = text.slice(text.indexOf('curl'));
    const told = JSON.parse(execFileSync('bash', ['-c', command], { stdio: ['ignore', 'pipe', 'ignore'] }));
    assert.ok(told.choices);
    await readRows(page, 1);
    assert.equal(await page.locator('#list pre').count(), 0);
  }));

test('the list says what was asked and answered, newest first, without reloading', () =>
  visit(async (page) => {
    await addFixture('first', { content: 'The answer is 42.' });
    await ask('my first question', { nonsense: 1 });
    const [first] = await readRows(page, 1);
    for (const part of ['my first question', 'The answer is 42.', MODEL, '200', ' ms', ' + ', 'nonsense'])
      assert.ok(first.includes(part), `${part} is not in ${first}`);
    await addFixture('sum', { toolCalls: [{ name: 'add', arguments: { a: 1 } }] });
    const tools = [{ type: 'function', function: { name: 'add', parameters: {} } }];
    await ask('the sum', { tools, stream: true });
    assert.match((await readRows(page, 2))[0], /the sum[^]*add\(\{"a":\s*1\}\)/);
    await addFixture('slow down', { status: 429 });
    await ask('slow down');
    assert.match((await readRows(page, 3))[0], /Request was rejected|rate/);
    await send('/v1/images/generations', { model: 'm', prompt: 'a boat', width: 64, height: 64 });
    await readRows(page, 4);
    await page.waitForFunction(() => document.querySelector('.row img')?.naturalWidth === 64);
  }));

test('calls of a test and of a conversation fold together, with their tokens', () =>
  visit(async (page) => {
    await ask('alone');
    for (const text of ['one', 'two']) await ask(text, {}, { [TEST_HEADER]: 'test-apples' });
    const messages = [{ role: 'user', content: 'hello' }];
    const answer = JSON.parse(await send('/v1/chat/completions', { model: MODEL, messages }));
    const said = { role: 'assistant', content: answer.choices[0].message.content };
    const more = [...messages, said, { role: 'user', content: 'and now?' }];
    const next = JSON.parse(await send('/v1/chat/completions', { model: MODEL, messages: more }));
    await readRows(page, 5);
    const titles = await page.locator('summary:visible').allInnerTexts();
    const tokens = answer.usage.total_tokens + next.usage.total_tokens;
    assert.equal(titles[0], `hello, 2 calls, ${tokens} tokens`);
    assert.match(titles[1], /^test test-apples, 2 calls, \d+ tokens$/);
    assert.equal(titles.length, 2);
    await page.locator('summary:visible').first().click();
    assert.equal(await row(page, 4).isVisible(), false);
  }));

test('a running call is shown and then updated, in the list and opened, also behind a filter', () =>
  visit(async (page) => {
    await addFixture('slowly', { content: 'At last.' }, { streamingProfile: { ttft: 2500 } });
    const done = ask('slowly', { stream: true });
    await readRows(page, 1);
    await row(page, 1).getByText('...').first().waitFor();
    await open(page, 1);
    await ask('meanwhile');
    await readRows(page, 2);
    await page.locator('#filter').fill('slowly');
    await readRows(page, 1);
    await done;
    await row(page, 1).getByText('200').waitFor();
    await side(page, 'Reply').getByText('At last.').waitFor();
    await page.getByText(/first event after \d{4}[.\d]* ms, \d+ events in/).waitFor();
  }));

test('filters: words, operation, status, test', () =>
  visit(async (page) => {
    await ask('about apples', {}, { [TEST_HEADER]: 'test-apples' });
    await ask('about pears');
    await send('/v1/embeddings', { model: 'm', input: 'apples' });
    await fetch(`${url}/v1/nothing`, { headers: { Authorization: 'Bearer x' } });
    await readRows(page, 4);
    const filter = page.locator('#filter');
    await filter.fill('apples');
    await readRows(page, 2);
    await filter.fill('kind:chat about apples');
    assert.match((await readRows(page, 1))[0], /about apples/);
    await filter.fill('kind:chat');
    await readRows(page, 2);
    await filter.fill('status:4xx');
    assert.match((await readRows(page, 1))[0], /404/);
    await filter.fill('status:200');
    await readRows(page, 3);
    await filter.fill('test:test-apples');
    await readRows(page, 1);
    await ask('more', {}, { [TEST_HEADER]: 'test-apples' });
    await ask('other');
    await readRows(page, 2); // new calls go through the filter, too
    const file = await (await fetch(await page.locator('#download').evaluate((link) => link.href))).json();
    assert.deepEqual(file.fixtures.map(({ match }) => match.userMessage), ['about apples', 'more']);
    await filter.fill('test:test-none');
    await page.getByText('No call passes the filter.').waitFor();
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
    await page.getByText('As JSON').click();
    assert.ok((await side(page, 'Request').textContent()).includes(attack));
    assert.ok((await side(page, 'Reply').textContent()).includes(attack));
    assert.ok((await side(page, 'Request').textContent()).includes('image: https://example.com/a.png'));
    await page.locator('#fixtures').click();
    await page.locator('#scripted textarea').waitFor();
    await page.waitForTimeout(300);
    assert.equal(await page.evaluate(() => window.ran), undefined);
    assert.equal(await page.locator('main img, main script').count(), 0);
  }));

test('an opened call shows conversation, tools and reply', () =>
  visit(async (page) => {
    await addFixture('picture', {
      content: 'It is red.',
      reasoning: 'I look at it.',
      toolCalls: [{ name: 'paint', arguments: { colour: 'red' } }],
    });
    const called = { name: 'look', arguments: '{"at":"sky"}' };
    const parameters = { type: 'object', properties: { colour: { type: 'string' } } };
    const tools = ['paint', 'look'].map((name) => ({ type: 'function', function: { name, description: `To ${name}`, parameters } }));
    const messages = [
      { role: 'system', content: 'Be exact.' },
      { role: 'assistant', content: null, tool_calls: [{ id: 'call_1', type: 'function', function: called }] },
      { role: 'tool', tool_call_id: 'call_1', content: '{"sky":"blue"}' },
      { role: 'user', content: [
        { type: 'text', text: 'What is in this picture?' },
        { type: 'image_url', image_url: { url: `data:image/png;base64,${PNG}` } },
      ] },
    ];
    for (const stream of [false, true])
      await send('/v1/chat/completions', { model: 'openai/with-eyes', messages, tools, stream });
    await readRows(page, 2);
    for (const number of [1, 2]) {
      await open(page, number);
      const request = await side(page, 'Request').textContent();
      for (const part of ['system', 'Be exact.', 'calls look', '"at": "sky"', 'call_1', '"sky": "blue"', 'picture?', 'paint(colour) To paint'])
        assert.ok(request.includes(part), `${part} is not in ${request}`);
      assert.equal(await side(page, 'Request').locator('img').evaluate((image) => image.naturalWidth), 1);
      const reply = await side(page, 'Reply').textContent();
      for (const part of ['assistant', 'It is red.', 'I look at it.', 'calls paint', '"colour": "red"'])
        assert.ok(reply.includes(part), `${part} is not in ${reply}`);
    }
  }));

test('a reply stands beside what was asked, misses where none answered', () =>
  visit(async (page) => {
    await addFixture('other', { content: 'No.' });
    await ask('hello');
    await readRows(page, 1);
    await page.setViewportSize({ width: 1200, height: 800 });
    await open(page, 1);
    const tops = [];
    for (const name of ['Request', 'Reply']) tops.push((await side(page, name).boundingBox()).y);
    assert.equal(tops[0], tops[1]);
    await page.getByText('does not contain "other"').waitFor();
  }));

test('a stream that was cut shows what had come, and where', () =>
  visit(async (page) => {
    await addFixture('break', { content: 'one two three four five' }, { disconnectAfterChunks: 3 });
    await ask('break', { stream: true }).catch(() => '');
    await readRows(page, 1);
    await open(page, 1);
    await page.getByText(/\d+ events in [\d.]+ ms, .*cut/).waitFor();
    await row(page, 1).getByText('200 cut').waitFor();
    assert.match(await side(page, 'Reply').textContent(), /one/);
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
      await row(page, number).click();
      await page.locator('#detail').getByText(/^#\d|deep|odd/).first().waitFor();
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
    await page.getByText('As JSON').click();
    const tasks = await page.evaluate(() => window.tasks);
    await checkTasks(page, tasks, LONGEST);
  }));

test('other kinds of calls are readable', () =>
  visit(async (page) => {
    await send('/v1/images/generations', { model: 'm', prompt: 'a boat', width: 64, height: 64 });
    await send('/v1/embeddings', { model: 'm', input: ['one', 'two'] });
    await send('/v1/rerank', { model: 'm', query: 'fruit', documents: ['apple', 'car'] });
    await send('/v1/audio/speech', { model: 'm', input: 'Hello.', voice: 'v', response_format: 'wav' });
    await send('/v1/completions', { model: 'm', prompt: 'Once' });
    await fetch(`${url}/v1/nothing`, { headers: { Authorization: 'Bearer x' } });
    await send('/v1/responses', { model: 'm', input: 'Hello?', stream: true });
    await readRows(page, 7);
    const reply = side(page, 'Reply');
    await open(page, 1);
    await page.waitForFunction(() => document.querySelector('#detail img')?.naturalWidth > 0);
    await open(page, 2);
    assert.match(await reply.textContent(), /"embedding": "-?\d.*\(\d+\)/);
    await open(page, 3);
    assert.match(await reply.textContent(), /"relevance_score": 0\.\d+/);
    await open(page, 4);
    await page.waitForFunction(() => document.querySelector('#detail audio')?.duration > 0);
    await page.evaluate(() => document.querySelector('#detail audio').play()); // fails where it is no sound
    await open(page, 5);
    assert.match(await reply.textContent(), /assistant[^]*\w+ \w+/);
    await open(page, 6);
    assert.match(await reply.textContent(), /error/);
    await open(page, 7);
    assert.match(await reply.textContent(), /assistant[^]*\w+ \w+/);
  }));

test('fixtures: where they stand, how often they were served, changed and removed', () =>
  visit(async (page, troubles) => {
    await addFixture('hello', { content: 'Hi!' });
    await addFixture('never', { content: 'No.' });
    await ask('hello');
    await page.locator('#fixtures').click();
    const cards = page.locator('#scripted .card');
    await cards.nth(1).waitFor();
    const titles = await cards.locator('h4').allInnerTexts();
    assert.match(titles[0], /served: 1/);
    assert.match(titles[1], /never served/);
    const text = cards.first().locator('textarea');
    await text.fill((await text.inputValue()).replace('Hi!', 'Changed.'));
    await cards.first().getByText('Save').click();
    await page.waitForFunction(() => document.querySelector('#scripted').innerText.match(/never served/g)?.length === 2);
    assert.match(await ask('hello'), /Changed\./);
    await cards.first().locator('textarea').fill('{"match": {"userMesage": "x"}}');
    await cards.first().getByText('Save').click();
    await page.getByText(/did you mean/).waitFor(); // and it is there still
    for (const left of [1, 0]) {
      await cards.first().getByText('Remove').click();
      await page.waitForFunction((n) => document.querySelectorAll('#scripted .card').length === n, left);
    }
    await page.getByText('Nothing is scripted').waitFor();
    await page.locator('#calls').click();
    await readRows(page, 2);
    assert.match(troubles.splice(0).join(), /400/); // the browser reports it itself
  }));

test('a copied fixture answers the same request equally, a copied curl runs, a call is sent again', () =>
  visit(async (page) => {
    const first = JSON.parse(await ask("What's this, \"quoted\"?"));
    await readRows(page, 1);
    await open(page, 1);
    assert.match(await copy(page, 'python'), /server\.reply\(/);
    const command = await copy(page, 'curl');
    const told = JSON.parse(execFileSync('bash', ['-c', command], { stdio: ['ignore', 'pipe', 'ignore'] }));
    assert.deepEqual(told.choices, first.choices);
    const copied = JSON.parse(await copy(page, 'fixture'));
    const fixtures = copied.fixtures ?? [copied].flat();
    assert.equal(JSON.parse(await send('/__parlel/fixtures', { fixtures })).ok, true);
    await page.getByText('Send again').click();
    await readRows(page, 3);
    const again = await (await fetch(`${url}/__parlel/requests/3`)).json();
    assert.equal(again.reply.choices[0].message.content, first.choices[0].message.content);
    assert.equal(again.reply.choices[0].finish_reason, first.choices[0].finish_reason);
    assert.notEqual(again.fixture, '');
  }));

test('copying works without the clipboard', () =>
  visit(
    async (page) => {
      await ask('hello');
      await readRows(page, 1);
      await open(page, 1);
      await page.getByText('Copy curl').click();
      assert.match(await page.evaluate(() => window.copied), /^curl /);
    },
    {},
    (page) => page.addInitScript(() => {
      Object.defineProperty(navigator, 'clipboard', { value: undefined });
      window.prompt = (title, text) => {
        window.copied = text;
      };
    }),
  ));

test('the keyboard does everything', () =>
  visit(async (page) => {
    for (let i = 1; i <= 60; i++) await ask(`question ${i}`);
    await readRows(page, 60);
    const press = (...keys) => keys.reduce((done, key) => done.then(() => page.keyboard.press(key)), Promise.resolve());
    await press('/');
    assert.equal(await focused(page), 'filter');
    await page.keyboard.type('j/k');
    assert.equal(await page.locator('#filter').inputValue(), 'j/k');
    await readRows(page, 0);
    await page.locator('#filter').fill('');
    await readRows(page, 60);
    await press('Escape', 'j', 'j', 'ArrowDown', 'k');
    assert.equal(await focused(page), 'call-59');
    await press('Enter');
    await page.locator('h2', { hasText: '#59 ' }).waitFor();
    assert.equal(await focused(page), 'detail');
    await press('Tab');
    assert.match(await page.evaluate(() => document.activeElement.textContent), /^Copy/);
    await press('k');
    await page.locator('h2', { hasText: '#60 ' }).waitFor();
    await press('Escape');
    assert.equal(await page.locator('#detail').isVisible(), false);
    assert.equal(await focused(page), 'call-60');
    await page.setViewportSize({ width: 420, height: 800 });
    await press('Enter');
    await page.locator('h2', { hasText: '#60 ' }).waitFor();
    assert.equal(await page.locator('#list').isVisible(), false); // a phone shows one of the two
    await page.getByText(/generated, .*Llama-3.*, [\d.]+ ms, \d+ \+ \d+ tokens/).waitFor();
    await page.locator('#fixtures').click();
    assert.equal(await page.locator('#scripted').isVisible(), true);
    await page.locator('#calls').click();
    await row(page, 60).focus();
    await press('Enter', '/');
    await page.keyboard.type('question 60');
    await readRows(page, 1);
    assert.equal(await page.locator('#list').isVisible(), true);
    await page.locator('#filter').fill('');
    await readRows(page, 60);
    await row(page, 60).focus();
    await press('Enter');
    assert.equal(await page.evaluate(() => document.documentElement.scrollWidth), 420);
    await press('Escape');
    assert.equal(await page.locator('#list').isVisible(), true);
  }));

test('1,000 calls do not block the page', () =>
  visit(async (page) => {
    for (let i = 0; i < 50; i++)
      await Promise.all(Array.from({ length: 20 }, (_, j) => ask(`question ${i}/${j}`)));
    await page.reload();
    await readRows(page, 1000);
    await page.evaluate(async () => {
      for (let i = 0; i < 60; i++) {
        document.querySelector('#list').scrollTop += 500;
        await new Promise(requestAnimationFrame);
      }
    });
    await ask('one more');
    await page.waitForFunction(() => document.querySelector('.row').textContent.includes('one more'));
    const tasks = await page.evaluate(() => window.tasks);
    await checkTasks(page, tasks, 2 * LONGEST);
  }));

test('reset empties the list and closes the call', () =>
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
    await side(page, 'Request').getByText('afterwards').waitFor();
  }));

test('a server that is gone is told', async () => {
  const other = await startServer();
  await visit(async (page, troubles) => {
    other.server.kill();
    await page.locator('#state', { hasText: 'disconnected' }).waitFor();
    troubles.length = 0; // the browser reports the failed request itself
  }, {}, undefined, other.url);
});

test('it is dark where the user likes that', async () => {
  const colours = [];
  for (const colorScheme of ['light', 'dark'])
    await visit(async (page) => {
      await ask('hello');
      await page.locator('.row').first().click();
      await page.locator('.card').first().waitFor();
      colours.push(await page.evaluate(() => getComputedStyle(document.body).backgroundColor));
    }, { colorScheme });
  const [light, dark] = colours.map((colour) => Number(colour.match(/\d+/)[0]));
  assert.ok(light > 200 && dark < 60, String(colours));
});

test('it is small, has nothing that its policy forbids, and is plain ASCII', async () => {
  const answer = await fetch(url, { headers: { Accept: 'text/html' } });
  assert.match(answer.headers.get('content-security-policy'), /default-src 'none'/);
  const text = await answer.text();
  assert.ok(text.length <= 16 * 1024, `${text.length} bytes`);
  for (const word of ['innerHTML', 'outerHTML', 'insertAdjacentHTML', 'document.write', 'eval(', '"""'])
    assert.equal(text.includes(word), false, word);
  assert.equal(text.split('<script').length, 2);
  assert.equal(text.split('<style').length, 2);
  assert.doesNotMatch(text, /<[^>]* (style|on\w+)=/);
  assert.doesNotMatch(text, /[^\x00-\x7f]/);
});
