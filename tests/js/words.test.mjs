// Run by node's own runner: node --test tests/js
import assert from 'node:assert/strict';
import { readdirSync, readFileSync } from 'node:fs';
import { test } from 'node:test';

import { preferred } from '../../app/web/player/language.js';
import { Words } from '../../app/web/player/words.js';

const FOLDER = new URL('../../app/web/languages/', import.meta.url);
const words = (language) => new Words(JSON.parse(readFileSync(new URL(`${language}.json`, FOLDER))), language === 'ja' ? '' : ' ');
const [german, japanese] = ['de', 'ja'].map(words);

const CASES = {
  'Generate': 'Erzeugen',
  ' Generate\n': ' Erzeugen\n',
  '0:05 / 1:00': '0:05 / 1:00',
  '1,234 notes': '1,234 Töne',
  '0:05 of 1:00': '0:05 von 1:00',
  'Done in 0:05. 1:00 / 0:59 of music, 961 latents, seeds 7 to 8.': 'Fertig in 0:05. 1:00 / 0:59 Musik, 961 Latents, Seeds 7 bis 8.',
  '0:10 of 1:00 of music · 0:05 left · 8.0× as fast as it plays · 961 latents · seed 7 · sharing the machine with 2 others':
    '0:10 von 1:00 Musik · noch 0:05 · 8.0× so schnell, wie es spielt · 961 Latents · Seed 7 · der Rechner wird mit 2 anderen geteilt',
  'Other pieces come first: you are number 3, in about 1:20.': 'Andere Stücke sind zuerst dran: du bist Nummer 3, in etwa 1:20.',
  'The length must be a number of seconds from 1 to 3600, got 5000': 'Länge: erwartet wird eine Zahl von Sekunden von 1 bis 3600, angegeben ist 5000',
  'The temperature must be a number from 0 to 2, got “wild”': 'Temperatur: erwartet wird eine Zahl von 0 bis 2, angegeben ist “wild”',
  '“Stop.mid” cannot be used: the file is empty. Choose a standard MIDI file (.mid) with piano notes.':
    '„Stop.mid“ kann nicht verwendet werden: die Datei ist leer. Wähl eine Standard-MIDI-Datei (.mid) mit Klaviernoten.',
  '“Undo” cannot be used: the file is empty.': '„Undo“ kann nicht verwendet werden: die Datei ist leer.',
  'Star Seed 5, 0:20 · 12:30': 'Mit Stern markieren: Seed 5, 0:20 · 12:30',
  'Auto: 961 latents fit this machine. Plays at once. Best coherence.': 'Automatisch: 961 Latents passen zu diesem Rechner. Spielt sofort. Bester Zusammenhang.',
  'The data of the model is one of many.': 'The data of the model is one of many.',
};

test('sentences are put together from the table, and numbers and names stay', () => {
  for (const [english, other] of Object.entries(CASES)) {
    assert.equal(german.translate(english), other);
    assert.equal(german.translate(english), other, 'and again');
  }
});

test('Japanese sentences follow each other without a space', () => {
  assert.equal(japanese.translate('Plays at once. Best coherence.'), 'すぐに鳴ります。まとまりは最良です。');
  assert.equal(japanese.translate('0:54 of music, 961 latents, seed 7.'), '音楽0:54、潜在変数961個、シード 7。');
  assert.equal(japanese.translate('There is nothing to undo.'), '元に戻すものがありません。');
});

test('a translation is not translated again, in any language', () => {
  for (const file of readdirSync(FOLDER)) {
    const language = words(file.replace('.json', ''));
    for (const other of Object.values(JSON.parse(readFileSync(new URL(file, FOLDER)))))
      if (!/[{]|^(Pedal|Tempo|Source|Variations|Octave|Volume)$/.test(other)) assert.equal(language.translate(other), other, file);
  }
});

test('the language is the one that was chosen, or the first of the browser’s that is known', () => {
  assert.equal(preferred(['de-AT', 'en'], null), 'de');
  assert.equal(preferred(['nl', 'ja'], null), 'ja');
  assert.equal(preferred(['nl'], null), 'en');
  assert.equal(preferred(['en-GB', 'de'], null), 'en');
  assert.equal(preferred(['de'], 'es'), 'es');
  assert.equal(preferred(['de'], 'xx'), 'de');
});
