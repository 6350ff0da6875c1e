// MIDI keyboards, through the browser's own Web MIDI.

/** @typedef {import('./instrument.js').Instrument} Instrument */

/**
 * Play an instrument by what a MIDI device sends.
 * @param {Instrument} instrument
 * @param {Uint8Array} message
 * @param {number} at in ms
 */
export function obey(instrument, message, at) {
  const [status, first = 0, second = 0] = message, kind = status & 0xf0;
  if (kind === 0x90 && second > 0) instrument.down(first, second, at);
  else if (kind === 0x80 || kind === 0x90) instrument.up(first, at);
  else if (kind === 0xb0 && first === 64) instrument.pedal(second >= 64, at);
  else if (kind === 0xb0 && (first === 120 || first === 123)) instrument.release(at);
}

/** @type {MIDIAccess | null} the only one: each further one would hear every key once more */
let access = null;

/**
 * Listen to all MIDI devices, also those that are plugged in later.
 * @param {Instrument} instrument
 * @param {(message: string) => void} tell says in words what is connected, and what was lost
 */
export async function connectMidi(instrument, tell) {
  if (!window.isSecureContext) {
    return tell('Browsers allow MIDI keyboards only on https pages and on the machine that runs the page. Play with the computer’s keys or the keys above.');
  }
  if (!('requestMIDIAccess' in navigator)) {
    return tell('This browser cannot use MIDI keyboards; Chrome, Edge and Firefox can. Play with the computer’s keys or the keys above.');
  }
  if (!access) {
    tell('If the browser asks, allow this page to use MIDI devices.');
    try {
      const found = await navigator.requestMIDIAccess();
      access ??= found;
    } catch {
      return tell('The browser did not allow MIDI. Allow it for this page in the address bar, then press “MIDI keyboard” again.');
    }
  }
  listen(access, instrument, tell);
}

/** @param {MIDIAccess} access @param {Instrument} instrument @param {(message: string) => void} tell */
function listen(access, instrument, tell) {
  const names = () => [...access.inputs.values()].filter((input) => input.state !== 'disconnected').map((input) => input.name ?? 'a MIDI device');
  const hear = () => {
    for (const input of access.inputs.values()) {
      input.onmidimessage = (event) => { if (event.data) obey(instrument, event.data, event.timeStamp); };
    }
  };
  hear();
  access.onstatechange = (event) => {
    const { port } = event;
    if (!port || port.type !== 'input') return;
    hear();
    if (port.state === 'disconnected') {
      instrument.release(performance.now());
      tell(`${port.name ?? 'The MIDI device'} is gone. What you played is kept; plug it in again to go on.`);
    } else if (names().length) tell(`Listening to ${names().join(', ')}.`);
  };
  tell(names().length ? `Listening to ${names().join(', ')}.` : 'No MIDI keyboard found. Plug one in: it is heard at once.');
}
