// A small application: it finds passages, calls tools, streams, and runs a batch.
import OpenAI, { toFile } from 'openai';
import Together from 'together-ai';

export const PASSAGES = [
  'Herons eat fish, frogs and sometimes small mammals.',
  "The lighthouse was built by the harbour's own masons.",
  'The sky is blue because air scatters short waves most.',
];
const CHAT_MODEL = 'openai/gpt-oss-20b';
const EMBEDDING_MODEL = 'intfloat/multilingual-e5-large-instruct';
const WEATHER: OpenAI.ChatCompletionFunctionTool = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'Get the weather of a city',
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
  },
};

export async function findPassage(question: string): Promise<string> {
  const answer = await new OpenAI().embeddings.create({ model: EMBEDDING_MODEL, input: [question, ...PASSAGES] });
  const [query, ...vectors] = answer.data.map((item) => item.embedding);
  const scores = vectors.map((vector) => vector.reduce((sum, value, at) => sum + value * query[at], 0));
  return PASSAGES[scores.indexOf(Math.max(...scores))];
}

export async function answerFromPassage(question: string): Promise<string | null> {
  const messages: OpenAI.ChatCompletionMessageParam[] = [
    { role: 'system', content: `Answer from this: ${await findPassage(question)}` },
    { role: 'user', content: question },
  ];
  const answer = await new OpenAI().chat.completions.create({ model: CHAT_MODEL, messages });
  return answer.choices[0].message.content;
}

export async function runAgent(question: string, getWeather: (city: string) => string): Promise<string | null> {
  const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: 'user', content: question }];
  for (;;) {
    const answer = await new OpenAI().chat.completions.create({ model: CHAT_MODEL, messages, tools: [WEATHER] });
    const { message } = answer.choices[0];
    if (!message.tool_calls?.length) return message.content;
    messages.push(message);
    for (const call of message.tool_calls) {
      const { city } = JSON.parse('function' in call ? call.function.arguments : '{}');
      messages.push({ role: 'tool', tool_call_id: call.id, content: getWeather(city) });
    }
  }
}

// The body of an endpoint's answer: server-sent events.
export function streamEndpoint(question: string): ReadableStream<Uint8Array> {
  const encoder = new TextEncoder();
  return new ReadableStream({
    async start(controller) {
      const messages: OpenAI.ChatCompletionMessageParam[] = [{ role: 'user', content: question }];
      const stream = await new OpenAI().chat.completions.create({ model: CHAT_MODEL, messages, stream: true });
      for await (const chunk of stream) {
        const text = chunk.choices[0]?.delta.content;
        if (text) controller.enqueue(encoder.encode(`data: ${JSON.stringify(text)}\n\n`));
      }
      controller.enqueue(encoder.encode('event: end\ndata:\n\n'));
      controller.close();
    },
  });
}

export async function answerInBatch(questions: string[]): Promise<Map<string, string>> {
  const client = new Together();
  const lines = questions.map((content, number) =>
    JSON.stringify({
      custom_id: String(number),
      body: { model: CHAT_MODEL, messages: [{ role: 'user', content }] },
    }),
  );
  // together-ai 0.52's own upload fails in ES modules.
  const data = await toFile(Buffer.from(lines.join('\n')), 'questions.jsonl');
  const file = await new OpenAI().files.create({ file: data, purpose: 'batch' });
  let { job } = await client.batches.create({ input_file_id: file.id, endpoint: '/v1/chat/completions' });
  while (!['COMPLETED', 'FAILED', 'EXPIRED', 'CANCELLED'].includes(job!.status!))
    job = await client.batches.retrieve(job!.id!);
  const output = await (await client.files.content(job!.output_file_id!)).text();
  return new Map(
    output
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line))
      .map((row) => [questions[Number(row.custom_id)], row.response.body.choices[0].message.content]),
  );
}
