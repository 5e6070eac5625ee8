// Writes vectors.jsonl, what tests/promises/canonical_form.rs expects without Node at hand:
//   node tests/canonical/make_vectors.mjs > tests/canonical/vectors.jsonl
// One JSON object a line: `about`; the body as `body` (text) or `hex` (where it is not UTF-8); `form`, what V8 makes of
// it, null where it is not JSON. The same every time: the random ones come from a seed.
import { canonical } from './oracle.mjs';

const lines = new Set();

function vector(about, body) {
  const bytes = Buffer.from(body);
  const isText = Buffer.from(bytes.toString('utf8')).equals(bytes);
  const input = isText ? { body: bytes.toString('utf8') } : { hex: bytes.toString('hex') };
  lines.add(JSON.stringify({ about, ...input, form: canonical(bytes) }));
}
const all = (about, ...bodies) => bodies.forEach((body) => vector(about, body));
const bytes = (...parts) => Buffer.concat(parts.map((part) => Buffer.from(part)));

all('any type at the top', '0', '""', 'null', 'true', 'false', '[]', '{}', '"text"', '-1.5e3');
all('white space', ' \t\r\n1 \t\r\n', '{ "a" : [ 1 , 2 ] , "b" : { } }', '[\n  1,\n  2\n]', '[ ]', '{\r\n}', '{"a" :1}',
  '{"a": 1}', '[1 ,2]');
all('no white space', '\v1', '\f1', '\u00a01', '\u20281', '\ufeff\ufeff1', '1\0', '\u30001', '/**/1', '[1]//');

for (const number of [
  '0', '-0', '0.0', '-0.0', '0e0', '-0e-0', '0e999999999999', '1', '-1', '10', '1.0', '1.10', '100.00', '-2.500', '0.5',
  '-0.5',
  '1e0', '1E0', '1e+0', '1e-0', '1e1', '1e20', '1e21', '1e22', '-1e21', '12e19', '12e20', '123e-2', '1e-5', '1e-6',
  '1e-7', '1.5e-6', '1.5e-7',
  '0.000001', '0.0000010', '0.0000001', '0.00000012', '-0.000001', '-0.0000001', '0.00001234', '0.000000', '-0.000000',
  '0.0000009999999',
  '999999999999999', '9999999999999999', '99999999999999999', '-999999999999999', '100000000000000', '1000000000000000',
  '9007199254740991', '9007199254740992', '9007199254740993', '9007199254740994', '9007199254740995',
  '-9007199254740993',
  '123456789012345', '1234567890123456', '12345678901234567', '12345678901234567890', '123456789012345678901',
  '1234567890123456789012',
  '0.1', '0.2', '0.30000000000000004', '0.123456789012345', '0.1234567890123456', '1.23456789012345',
  '1.234567890123456', '1.2345678901234567',
  '12345678901234.5', '12345678901234.0', '123456789012345.0', '1234567890123.45', '1689194871.0', '1689194871.123456',
  '1689194871.1234567',
  '4.35', '4.349999999999999', '2.2250738585072014e-308', '2.2250738585072011e-308', '2.2250738585072012e-308',
  '5e-324', '4.9e-324', '3e-324', '2.4703282292062327e-324',
  '2.4703282292062328e-324', '2e-324', '1e-400', '-1e-400', '1.7976931348623157e308', '1.7976931348623158e308',
  '1.7976931348623159e308', '-1.7976931348623159e308',
  '1e308', '1e309', '1e400', '-1e400', '1e99999999999999999999', '1e-99999999999999999999', '8.5e-5', '9.5e-7',
  '1.0e+2', '5e-7', '123.456e3',
  '1.00000000000000011102230246251565404236316680908203124', '1.00000000000000011102230246251565404236316680908203125',
  '1.00000000000000011102230246251565404236316680908203126', '9007199254740992.99999999999999999999',
  '0.000000000000000000000000000000000000000000000000000000000001',
  `${'1'.repeat(400)}`, `0.${'0'.repeat(400)}1`, `1${'0'.repeat(308)}`, `1${'0'.repeat(309)}`, `${'9'.repeat(30)}e-30`,
  `0.${'3'.repeat(800)}`,
  `0.${'0'.repeat(40)}e99999999999999999999`, `0.${'0'.repeat(40)}1e99999999999999999999`,
  `${'1'.repeat(40)}e-99999999999999999999`, `-${'0.'}${'0'.repeat(40)}`, `1${'0'.repeat(40)}e-40`,
  '2.4703282292062327208e-324', '2.4703282292062327207e-324', '2.4703282292062327209e-324',
  `${5n ** 1075n}e-1075`, `${5n ** 1075n + 1n}e-1075`, `${3n * 5n ** 1075n}e-1075`, `${3n * 5n ** 1075n - 1n}e-1075`,
]) vector('numbers', number);
all('numbers in place', '[1.0,2,-0,3e2,null]', '{"a":1.0,"b":-0,"c":1e400,"d":1}', '[ 1.0 , 1e2 ]', '[-0]', '[0,-0,0]');
all('no numbers', '-', '+1', '.5', '1.', '01', '-01', '00', '1e', '1e+', '1.e1', '0x10', '1_0', 'NaN', 'Infinity',
  '-Infinity', '1a', '--1', '1.2.3', '١', '1e1.5', '-.5', '1ee1');

for (let unit = 0; unit < 0x20; unit++) {
  const hex = unit.toString(16).padStart(4, '0');
  vector('escaped controls', `["\\u${hex}","\\u${hex.toUpperCase()}"]`);
  vector('controls as they are', `"${String.fromCharCode(unit)}"`);
}
all('short escapes', '"\\"\\\\\\/\\b\\f\\n\\r\\t"', '"\\u0022\\u005c\\u002F\\u0008\\u000c\\u000A\\u000d\\u0009"',
  '"a\\/b"', '"\\/"', '"\\\\\\/"', '"\\\\/"', '"\\\\u0041"', '"\\\\\\u0041"');
all('escaped characters', '"\\u0041\\u00e9\\u00E9\\u4e2d\\uffff\\ufffe\\ufeff"',
  '"\\u2028\\u2029\\u007f\\u0080\\u009f\\u00a0"', '"é中😀\u2028\u2029\u007f\u0080\ufeff"', '"x\\u0041"', '"\\u0041x"');
all('surrogates', '"\\ud83d\\ude00"', '"\\uD83D\\uDE00"', '"\\ud83d"', '"\\uDE00"', '"\\ude00\\ud83d"',
  '"\\ud83d\\ud83d\\ude00"', '"\\ud83d\\ude00\\ude00"', '"\\ud83dx\\ude00"',
  '"\\ud83d\\n\\ude00"', '"\\ud83d\\\\ude00"', '"\\ud800\\udc00\\udbff\\udfff"', '"\\ud800"', '"\\uDBFF"', '"\\udc00"',
  '"\\uDFFF"', '"\\ud7ff\\ue000"', '"\\ud83d\\u0041"', '"\\ud83d😀"', '"😀\\ude00"', '{"\\uD83D":"\\uDE00"}');
all('no strings', '"', '"a', '"\\', '"\\"', '"\\x"', '"\\u"', '"\\u12"', '"\\u12g4"', '"\\u+123"', '"\\u 123"',
  '"\\U0041"', '"\\v"', '"\\0"', "'a'", '"a\nb"', '"\\\n"', '"a""b"', '"\\u00e"');

const BOM = [0xef, 0xbb, 0xbf];
all('byte order mark', bytes(BOM, '1'), bytes(BOM, BOM, '1'), bytes(BOM, '"', BOM, '"'), bytes(' ', BOM, '1'),
  bytes(BOM), bytes([0xef, 0xbb], '1'), bytes([0xfe, 0xff], '1'), bytes(BOM, ' {"b":1,"1":2}'));
for (const bad of [
  [0x80], [0xbf], [0xc0, 0x80], [0xc1, 0xbf], [0xc2], [0xc2, 0x41], [0xe0, 0x80, 0x80], [0xe0, 0x9f, 0xbf],
  [0xe2, 0x82], [0xe2, 0x82, 0x41], [0xed, 0xa0, 0x80],
  [0xed, 0xa0, 0xbd, 0xed, 0xb8, 0x80], [0xf0, 0x80, 0x80, 0x80], [0xf0, 0x9f], [0xf0, 0x9f, 0x98],
  [0xf0, 0x9f, 0x98, 0x41], [0xf4, 0x90, 0x80, 0x80], [0xf5, 0x80], [0xff], [0xfe, 0xff],
  [0xf8, 0x88, 0x80, 0x80, 0x80], [0xf0, 0x9f, 0x98, 0xf0, 0x9f, 0x98, 0x80], [0xe2, 0x28, 0xa1],
]) {
  vector('invalid UTF-8', bytes('["', bad, '"]'));
  vector('invalid UTF-8 in a key', bytes('{"', bad, '":1,"\\ufffd":2}'));
}
all('invalid UTF-8', bytes([0xff], '1'), bytes('1', [0xc2]), bytes('"', [0xe2, 0x82]), bytes('"\\', [0xff], '"'));

all('index keys', '{"b":0,"1":1}', '{"10":0,"9":1,"1":2}', '{"1":0,"2":1,"a":2}', '{"a":0,"0":1}',
  '{"2":0,"b":1,"1":2,"a":3}', '{"0":0}', '{"1":1,"1":2}', '{"1":1,"0":2,"1":3}', '{"\\u0031":1,"a":2}',
  '{"a":2,"\\u0031":1,"1":3}',
  '{"a":0,"1":{"b":0,"2":{"c":0,"3":[{"d":0,"4":0}]}}}', '[{"b":0,"1":1},{"1":1,"b":0}]', '{ "b" : 0 , "1" : 1.0 }');
for (const key of ['0', '00', '01', '-0', '-1', '+1', '1.0', '1.5', '1e3', ' 1', '1 ', '1a', 'a1', '0x1', '',
  '2147483647', '2147483648', '4294967293', '4294967294', '4294967295', '4294967296', '9007199254740991',
  '9007199254740992', '9007199254740993', '99999999999', '18446744073709551615', '9999999999', '10000000000',
  'Infinity', 'NaN', '١', '１']) {
  vector('what is an index', `{"z":0,${JSON.stringify(key)}:1,"4294967294":2,"5":3}`);
}
all('equal keys', '{"a":1,"a":2}', '{"a":1,"b":2,"a":3}', '{"a":1,"\\u0061":2}', '{"":1,"":2}',
  '{"a":{"x":1},"a":{"y":2}}', '{"a":1,"b":2,"b":3,"a":4,"c":5,"a":6}', '{"é":1,"\\u00e9":2,"e\\u0301":3}',
  '{"\\ud83d":1,"\\uD83D":2}',
  '{"\\/":1,"/":2}', '{"a":[{"b":0,"1":1}],"a":[{"c":0,"1":1,"1":2}]}',
  '{"a":1,"1":{"b":1,"b":2},"a":{"0":1,"b":3,"0":2}}', '{"k":1, "k":2 , "k" :3}');
all('names that JavaScript knows', '{"__proto__":1}', '{"__proto__":null,"a":1}', '{"a":1,"__proto__":{"b":2}}',
  '{"__proto__":1,"__proto__":2}', '{"constructor":1,"toString":2,"hasOwnProperty":3,"length":4}', '{"toJSON":1}',
  '{"toJSON":{"a":1}}', '{"__proto__":{"toJSON":1},"1":2}', '{"\\u005f_proto__":[1]}',
  '{"__defineGetter__":0,"valueOf":1,"prototype":2}');

for (const count of [2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 128, 200]) {
  const keys = [...Array(count).keys()];
  const object = (names) => `{${names.map((name, i) => `"${name}":${i}`).join()}}`;
  if (count < 100) vector('many keys', object(keys.map((key) => `k${key}`)));
  if (count < 40) vector('many keys', object(keys.map((key) => count - key)));
  vector('many keys', object(keys.map((key) => (key * 7919) % 23)));
  if (count < 70) vector('many keys', object(keys.map((key) => ['x', 1, 'y', 0][key % 4] + String(key % 13))));
}
for (const count of [2, 3, 40, 70]) {
  const members = [...Array(count).keys()].map((i) => `"abcdefgh${i % 37}abcdefgh":${i}`);
  vector('the same first and last eight bytes', `{${members.join()}}`);
}

all('not JSON', '', ' ', '{', '}', '[', ']', '{]', '[}', '[1', '{"a"', '{"a":', '{"a":1', '{"a":1]', '[1}', '[,]',
  '[1,]', '[,1]', '[1,,2]', '{,}', '{"a":1,}', '{,"a":1}', '{"a"}', '{"a" 1}', '{"a"::1}', '{a:1}', '{1:1}',
  '{null:1}',
  "{'a':1}", '[1 2]', '1 2', '1,2', '"a" "b"', '{}{}', '[]]', 'tru', 'True', 'truex', 'nul', 'nulll', 'fals',
  'undefined', '[true false]', '{"a":1 "b":2}', '{"a":1,,"b":2}', '[1:2]', '{"a",1}', '\\u0031', '[1]x', '{"b":0,"1":',
  '{"a":1,"a":', '(1)');

// Random ones: values of every kind, written in every way, some then damaged.
let state = 20261123;
function random(below) { // mulberry32
  state = (state + 0x6d2b79f5) | 0;
  let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
  mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
  return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
}
const pick = (list) => list[random(list.length)];
const some = (upTo, make) => Array.from({ length: random(upTo + 1) }, make);
const space = () => (random(4) ? '' : some(2, () => pick([' ', '\t', '\n', '\r'])).join(''));
const character = () => pick(['a', 'b', 'é', '中', '😀', '/', '\\/', '\\n', '\\"', '\\\\', '\\u0061', '\\u00E9',
  '\\ud83d', '\\uDE00', '\\u001F', '\\u0009', '\u2028', '\u007f', ' ']);
const string = () => `"${some(5, character).join('')}"`;
const key = () => (random(3) ? `"${pick(['a', 'b', '1', '0', '10', '2', '\\u0031', '\\u0061', '4294967294',
  '4294967295', '__proto__', '', '01', 'é'])}"` : string());
const number = () => pick(['0', '-0', '1.0', '1e5', '-1.50', '1e21', '1e-7', '1e999', '12345678901234567890',
  `${random(1e9) / 1e3}`, `${random(1e9)}e-${random(30)}`, `-${random(1e6)}.${random(1e6)}`]);
function value(depth) {
  const kind = random(depth > 4 ? 5 : 9);
  const inside = () => space() + value(depth + 1) + space();
  if (kind < 2) return number();
  if (kind < 4) return string();
  if (kind < 5) return pick(['true', 'false', 'null']);
  if (kind < 7) return `[${some(4, inside).join() || space()}]`;
  return `{${some(6, () => space() + key() + space() + ':' + inside()).join() || space()}}`;
}
for (let i = 0; i < 300; i++) vector('random', space() + value(0) + space());
for (let i = 0; i < 100; i++) {
  const damaged = Buffer.from(value(0));
  damaged[random(damaged.length)] = pick([...Buffer.from('"\\{}[],:0e.-u '), 0xff, 0xc3, 0x00]);
  vector('random, damaged', damaged);
}

process.stdout.write(`${[...lines].join('\n')}\n`);
