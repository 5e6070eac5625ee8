// Node as the judge of canonical forms. Reads one body a line, in hex; answers one line each: its canonical form in
// hex, `not JSON` where JSON.parse throws a SyntaxError, `too deep` where V8 runs out of stack.
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';

/** The canonical form of a body (bytes), as Loop computes it; null where it is not JSON. A RangeError where V8 cannot. */
export function canonical(body) {
  const text = new TextDecoder().decode(body);
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    if (error instanceof SyntaxError) return null;
    throw error;
  }
  return JSON.stringify(value);
}

function answer(body) {
  try {
    const form = canonical(body);
    return form === null ? 'not JSON' : Buffer.from(form).toString('hex');
  } catch (error) {
    if (error instanceof RangeError) return 'too deep';
    throw error;
  }
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  for await (const line of createInterface({ input: process.stdin })) {
    process.stdout.write(`${answer(Buffer.from(line, 'hex'))}\n`);
  }
}
