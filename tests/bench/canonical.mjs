// How fast Node makes canonical forms: `node canonical.mjs FILE MS` reads one body a line, makes the forms of all of them
// again and again for MS milliseconds to warm up and for as long to be timed, and prints MB of bodies a second. From
// bytes to bytes, as a server has them: TextDecoder and Buffer are part of it.
import { readFileSync } from 'node:fs';

const [file, ms] = process.argv.slice(2);
const bodies = readFileSync(file, 'utf8').split('\n').map((line) => Buffer.from(line));
const decoder = new TextDecoder();
let sink = 0;

function run(span) {
  const begin = performance.now();
  let bytes = 0;
  while (performance.now() - begin < span) {
    for (const body of bodies) {
      sink += Buffer.from(JSON.stringify(JSON.parse(decoder.decode(body)))).length;
      bytes += body.length;
    }
  }
  return bytes / 1e3 / (performance.now() - begin);
}

run(Number(ms));
const rate = run(Number(ms));
if (sink === 0) throw new Error('nothing was made');
console.log(rate);
