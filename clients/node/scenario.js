// What docs/clients.md asks of the program that shows a client: node scenario.js ADDRESS SCENARIO PROMPT MAX_TOKENS

'use strict';

const { Client, EdgeRtError } = require('./edge-rt.js');

async function main([address, scenario, prompt, maxTokens]) {
  const client = await Client.connect(address);
  try {
    const options = { max_tokens: Number(maxTokens), temperature: 0, ignore_eos: true };
    const generation = client.generate(prompt, { ...options, resumable: scenario !== 'answer' });
    for await (const event of generation) {
      if (event.event !== 'delta') continue;
      process.stdout.write(event.text);
      if (scenario === 'cancel') await generation.cancel();
      if (scenario === 'leave') break;
      if (scenario === 'slow') await new Promise((resolve) => setTimeout(resolve, 20));
    }
    await client.status();
  } finally {
    client.close();
  }
}

main(process.argv.slice(2)).catch((error) => {
  if (!(error instanceof EdgeRtError)) throw error;
  console.error(`error: ${error.code}`);
  process.exitCode = 3;
});
