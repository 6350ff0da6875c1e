// A conversation with the server: what a person plays goes there, and the model's answers come back, event by event.
// docs/reference/http-api.md describes the messages. This module makes no sound and draws nothing.

/**
 * An event of a person: a key goes down or up, or the sustain pedal moves (0 to 127). Times are in seconds from the
 * start of the conversation.
 * @typedef {[time: number, kind: 'on', pitch: number, velocity: number] | [time: number, kind: 'off', pitch: number]
 *   | [time: number, kind: 'pedal', value: number]} Played
 */

/**
 * An event of an answer: a note begins or ends. `release` says that for the model a note of the person ends here; it is
 * kept, and makes no sound.
 * @typedef {[time: number, kind: 'on', pitch: number, velocity: number] | [time: number, kind: 'off', pitch: number]
 *   | [time: number, kind: 'release', pitch: number]} Answered
 */

/**
 * Everything that a conversation has had.
 * @typedef {object} Timeline
 * @property {[onset: number, offset: number, pitch: number, velocity: number][]} notes what it began with, sorted
 * @property {Played[]} played
 * @property {Answered[]} answered
 */

/**
 * What `answer` may choose. Left out, each has the server's default.
 * @typedef {object} Wishes
 * @property {number} [seconds] length of the answer at most
 * @property {number} [lead] seconds from the request to the first note
 * @property {number} [seed]
 * @property {number} [temperature]
 * @property {number} [top_p]
 * @property {number} [steadiness]
 * @property {number} [top_k]
 * @property {number} [min_p]
 * @property {number} [lowest_pitch]
 * @property {number} [highest_pitch]
 */

/**
 * @typedef {'closed' | 'connecting' | 'ready' | 'lost'} Connection
 */

const TAKEN_OVER = 4001; // another tab has the conversation
const REFUSED = [1008, 4000, TAKEN_OVER]; // trying again would not help
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15000;
const KEY = 'music-ar-conversation';

/** @param {Partial<Timeline>} [timeline] @returns {Timeline} */
const copied = ({ notes = [], played = [], answered = [] } = {}) =>
  ({ notes: [...notes], played: [...played], answered: [...answered] });

/** Tenths of a millisecond. @param {number} seconds */
const rounded = (seconds) => Math.round(seconds * 10000) / 10000;

/**
 * An answer as it was heard: events up to a time. What still sounds then ends then.
 * @param {Answered[]} answered @param {number} heard @returns {Answered[]}
 */
export function cut(answered, heard) {
  return ended(answered.filter(([time]) => time <= heard), heard);
}

/** @param {Answered[]} answered @param {number} time @returns {Answered[]} */
function ended(answered, time) {
  const sounding = new Map();
  for (const [, kind, pitch] of answered) {
    if (kind === 'on') sounding.set(pitch, (sounding.get(pitch) ?? 0) + 1);
    if (kind === 'off') sounding.set(pitch, (sounding.get(pitch) ?? 0) - 1);
  }
  const offs = [...sounding].flatMap(([pitch, count]) => Array.from({ length: count }, () => [rounded(time), 'off', pitch]));
  return [...answered, .../** @type {Answered[]} */ (offs)];
}

/**
 * Says when a person has paused: no key has been down for some time after the last one came up.
 */
export class Pause {
  /**
   * @param {() => void} paused called at each pause
   * @param {number} seconds how long
   * @param {{ setTimeout: (run: () => void, ms: number) => any, clearTimeout: (timer: any) => void }} [timers]
   */
  constructor(paused, seconds, timers = { setTimeout: globalThis.setTimeout.bind(globalThis), clearTimeout: globalThis.clearTimeout.bind(globalThis) }) {
    this.seconds = seconds;
    this.paused = paused;
    this.timers = timers;
    /** @type {Set<number>} */ this.down = new Set();
    /** @type {any} */ this.timer = null;
  }

  /** Take note of what was played. @param {Played[]} events */
  play(events) {
    for (const [, kind, pitch] of events) {
      if (kind === 'on') this.down.add(pitch);
      if (kind === 'off') this.down.delete(pitch);
      if (kind !== 'pedal') this.stop();
      if (kind === 'off' && !this.down.size) this.timer = this.timers.setTimeout(this.paused, 1000 * this.seconds);
    }
  }

  /** Wait no longer, until a key comes up again. */
  stop() {
    this.timers.clearTimeout(this.timer);
    this.timer = null;
  }
}

/**
 * A conversation. It keeps everything that was played and heard, so that nothing is lost with the connection or the
 * server: it connects again by itself, and takes up where it was.
 *
 * Events (`addEventListener`), each with what is named here in `detail`:
 * - `connection` {connection, message}: it is connected, or no longer; the message is for people, perhaps empty.
 * - `ready` {resumed, latents}: the server knows the timeline. `resumed`: it still had this conversation.
 * - `answering` {id, at, others}: an answer begins at this time; the machine is shared with so many others.
 * - `music` {id, events, until}: events of the answer; no later ones begin before `until`.
 * - `end` {id, at, why}: the answer is over: 'enough', 'ended' (by the model), 'silenced', 'lost' or 'failed'.
 * - `problem` {code, message}: something was refused; the message says what was expected and what came.
 * - `change`: the timeline has changed.
 */
export class Conversation extends EventTarget {
  /**
   * @param {string | URL} page address of the page; the server's address follows from it
   * @param {object} [options]
   * @param {Partial<Timeline>} [options.timeline] what it begins with
   * @param {number} [options.latents] latent budget; 0 lets the server choose
   * @param {Pick<Storage, 'getItem' | 'setItem' | 'removeItem'> | null} [options.storage] keeps the session's name over
   *   a reload; default: that of the tab
   * @param {typeof WebSocket} [options.socket]
   * @param {() => number} [options.random]
   */
  constructor(page, { timeline, latents = 0, storage, socket, random = Math.random } = {}) {
    super();
    const address = new URL('conversation', page);
    address.protocol = address.protocol === 'https:' ? 'wss:' : 'ws:';
    address.search = address.hash = '';
    this.address = address.href;
    this.latents = latents;
    this.timeline = copied(timeline);
    /** @type {Connection} */ this.connection = 'closed';
    /** Number of the answer under way; null if there is none. @type {number | null} */ this.answering = null;
    this.storage = storage === undefined ? (globalThis.sessionStorage ?? null) : storage;
    this.WebSocket = socket ?? globalThis.WebSocket;
    this.random = random;
    this.answers = 0;
    this.since = 0; // when the latest answer was asked for
    this.attempts = 0;
    /** @type {WebSocket | null} */ this.socket = null;
    /** @type {any} */ this.retry = null;
    this.retryNow = () => { if (this.connection === 'lost') this.connect(); };
    globalThis.addEventListener?.('online', this.retryNow);
  }

  /** Connect, or connect again at once. With a session's name kept and no notes, the server's notes are taken. */
  connect() {
    clearTimeout(this.retry);
    this.#leave();
    this.#say('connecting');
    const socket = this.socket = new this.WebSocket(this.address);
    socket.onopen = () => this.#send({ type: 'open', session: this.#session(), latents: this.latents, ...this.#known() });
    socket.onmessage = ({ data }) => { if (socket === this.socket) this.#take(JSON.parse(data)); };
    socket.onclose = ({ code, reason }) => { if (socket === this.socket) this.#lost(code, reason); };
  }

  /** End the connection. The timeline stays, and the server keeps the session for a while. */
  close() {
    clearTimeout(this.retry);
    globalThis.removeEventListener?.('online', this.retryNow);
    this.#leave();
    this.#stopped('lost');
    this.#say('closed');
  }

  /**
   * Add what a person has played. A key that goes down ends the answer under way at that moment. Times never go back:
   * an event earlier than the last one counts as at the same time.
   * @param {Played[]} events
   */
  play(events) {
    if (!events.length) return;
    const { played } = this.timeline;
    let latest = played.length ? played[played.length - 1][0] : 0;
    const sorted = [...events].sort((a, b) => a[0] - b[0]).map(([time, ...rest]) => {
      latest = Math.max(latest, rounded(time));
      return /** @type {Played} */ ([latest, ...rest]);
    });
    const first = sorted.find(([, kind]) => kind === 'on');
    if (first && this.answering !== null) this.silence(first[0]);
    played.push(...sorted);
    if (this.connection === 'ready') this.#send({ type: 'play', events: sorted });
    this.#tell('change', {});
  }

  /**
   * Ask for an answer that begins at a time, plus a lead; an earlier one ends there.
   * @param {number} from @param {Wishes} [wishes] @returns {number | null} its number; null without a connection
   */
  answer(from, wishes = {}) {
    if (this.connection !== 'ready') {
      this.#tell('problem', { code: 'offline', message: 'There is no connection to the server; what you play is kept.' });
      return null;
    }
    if (this.answering !== null) this.silence(from);
    this.answering = ++this.answers;
    this.since = rounded(from);
    this.#send({ type: 'answer', id: this.answering, from: rounded(from), ...wishes });
    return this.answering;
  }

  /** End the answer under way; it is kept up to this time. @param {number} heard */
  silence(heard) {
    if (this.answering === null) return;
    const at = Math.max(rounded(heard), this.since); // earlier answers are not cut
    this.timeline.answered = cut(this.timeline.answered, at);
    if (this.connection === 'ready') this.#send({ type: 'silence', id: this.answering, heard: at });
    this.#stopped('silenced', at);
    this.#tell('change', {});
  }

  /** Continue with another timeline: after an undo, from a cut, or from a file. @param {Partial<Timeline>} timeline */
  replace(timeline) {
    this.#stopped('silenced');
    this.timeline = copied(timeline);
    if (this.connection === 'ready') this.#send({ type: 'replace', timeline: this.timeline });
    this.#tell('change', {});
  }

  /** Address of the conversation as a MIDI file, while the server has it; null before. @returns {string | null} */
  get file() {
    const session = this.#session();
    return session && this.address.replace(/^ws/, 'http') + `/${session}.mid`;
  }

  /** The conversation as a MIDI file, from the notes that are kept here. @returns {Promise<Blob>} */
  async midi() {
    const body = JSON.stringify({ timeline: this.timeline });
    const answer = await fetch(this.address.replace(/^ws/, 'http'), { method: 'POST', body });
    if (!answer.ok) throw new Error((await answer.json()).detail);
    return answer.blob();
  }

  #known() {
    const { notes, played, answered } = this.timeline;
    return notes.length || played.length || answered.length ? { timeline: this.timeline } : {};
  }

  /** @returns {string | null} */
  #session() {
    try { return this.storage?.getItem(KEY) ?? null; } catch { return null; }
  }

  /** @param {string | null} session */
  #keep(session) {
    try {
      if (session === null) this.storage?.removeItem(KEY);
      else this.storage?.setItem(KEY, session);
    } catch { /* a browser without storage: the notes are kept all the same, until it is reloaded */ }
  }

  /** @param {any} message */
  #take(message) {
    const { type, ...detail } = message;
    if (type === 'ready') {
      this.attempts = 0;
      this.#keep(detail.session);
      if (detail.timeline) this.timeline = copied(detail.timeline);
      this.answers = Math.max(this.answers, detail.answers ?? 0);
      this.#say('ready');
      this.#tell('ready', detail);
      if (detail.timeline) this.#tell('change', {});
    } else if (type === 'music') {
      if (detail.id !== this.answering) return; // it was silenced meanwhile
      this.timeline.answered.push(...detail.events);
      this.#tell('music', detail);
      this.#tell('change', {});
    } else if (type === 'end') {
      if (detail.id !== this.answering) return;
      this.answering = null;
      this.#tell('end', detail);
    } else if (type === 'answering') {
      if (detail.id === this.answering) this.#tell('answering', detail);
    } else if (type === 'error') {
      this.#tell('problem', detail);
    }
  }

  /** @param {number} code @param {string} reason */
  #lost(code, reason) {
    this.socket = null;
    this.#stopped('lost');
    if (REFUSED.includes(code)) {
      if (code === TAKEN_OVER) this.#keep(null);
      this.#say('closed', reason);
      return;
    }
    const wait = Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** this.attempts++) * (0.5 + 0.5 * this.random());
    this.retry = setTimeout(() => this.connect(), wait);
    this.#say('lost', reason || 'The connection to the server is lost; what you play is kept.');
  }

  #leave() {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
  }

  /** @param {string} why @param {number} [at] */
  #stopped(why, at) {
    if (this.answering === null) return;
    const id = this.answering, { answered } = this.timeline;
    this.answering = null;
    if (at === undefined && answered.length) this.timeline.answered = ended(answered, answered[answered.length - 1][0]);
    this.#tell('end', { id, at: at ?? null, why });
  }

  /** @param {Connection} connection @param {string} [message] */
  #say(connection, message = '') {
    this.connection = connection;
    this.#tell('connection', { connection, message });
  }

  /** @param {object} message */
  #send(message) {
    this.socket?.send(JSON.stringify(message));
  }

  /** @param {string} type @param {object} detail */
  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
