// The application, tested with vitest and nothing but what the README shows.
import { beforeEach, expect, test } from 'vitest';

import { calls, reply, reset } from './fake.mjs';
import { answerFromPassage, answerInBatch, findPassage, PASSAGES, runAgent, streamEndpoint } from './app';

beforeEach(reset);

test('retrieval', async () => {
  expect(await findPassage('What do herons eat?')).toBe(PASSAGES[0]);
  await reply({ systemMessage: 'Herons eat', userMessage: 'herons' }, { content: 'Fish.' });
  expect(await answerFromPassage('What do herons eat?')).toBe('Fish.');
  expect((await calls()).map((call: { kind: string }) => call.kind)).toEqual(['embedding', 'embedding', 'chat']);
});

test('tools', async () => {
  await reply({ hasToolResult: true }, { content: 'It rains.' });
  expect(await runAgent('the weather in Rome', () => 'rain')).toBe('It rains.');
  expect((await calls()).at(-1).body.messages.at(-1).content).toBe('rain');
});

test('streaming', async () => {
  await reply({}, { content: 'Good morning!' }, { chunkSize: 5 });
  const text = await new Response(streamEndpoint('hello')).text();
  expect(text).toBe('data: "Good "\n\ndata: "morni"\n\ndata: "ng!"\n\nevent: end\ndata:\n\n');
});

test('batch', async () => {
  await reply({ userMessage: 'lighthouse' }, { content: 'Masons.' });
  const answers = await answerInBatch(['Who built the lighthouse?', 'Why is the sky blue?']);
  expect(answers.get('Who built the lighthouse?')).toBe('Masons.');
});
