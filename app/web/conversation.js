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
 * @typedef {object} AnswerOptions
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
 * - `end` {id, at, why}: nothing more comes of the answer: 'enough', 'ended' (by the model), 'silenced', 'lost' or
 *   'failed'. What was made before may still have to be heard; an answer that is silenced then ends a second time.
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
    /**
     * The latest answer: when it was asked for, and where it ends, Infinity while more may come.
     * @type {{ id: number, since: number, end: number } | null}
     */
    this.latest = null;
    this.storage = storage === undefined ? (globalThis.sessionStorage ?? null) : storage;
    this.WebSocket = socket ?? globalThis.WebSocket;
    this.random = random;
    this.answers = 0;
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
    this.#stop('lost');
    this.#say('closed');
  }

  /** Begin another session at the next `connect`. */
  forget() { this.#keep(null); }

  /**
   * Add what a person has played. A key that goes down ends an answer that still sounds, at that moment. Times never go
   * back: an event earlier than the last one counts as at the same time.
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
    if (first) this.silence(first[0]);
    played.push(...sorted);
    if (this.connection === 'ready') this.#send({ type: 'play', events: sorted });
    this.#tell('change', {});
  }

  /**
   * Ask for an answer that begins at a time, plus a lead; an earlier one ends there.
   * @param {number} from @param {AnswerOptions} [options] @returns {number | null} its number; null without a connection
   */
  answer(from, options = {}) {
    if (this.connection !== 'ready') {
      this.#tell('problem', { code: 'offline', message: 'There is no connection to the server; what you play is kept.' });
      return null;
    }
    this.silence(from);
    const id = ++this.answers;
    this.latest = { id, since: rounded(from), end: Infinity };
    this.#send({ type: 'answer', id, from: rounded(from), ...options });
    return id;
  }

  /** Whether more may come of the latest answer. */
  get answering() {
    return this.latest !== null && this.latest.end === Infinity;
  }

  /** End the latest answer, if it reaches beyond this time; it is kept up to there. @param {number} heard */
  silence(heard) {
    const latest = this.latest;
    if (!latest || heard >= latest.end) return;
    latest.end = Math.max(rounded(heard), latest.since); // earlier answers are not cut
    this.timeline.answered = cut(this.timeline.answered, latest.end);
    if (this.connection === 'ready') this.#send({ type: 'silence', id: latest.id, heard: latest.end });
    this.#tell('end', { id: latest.id, at: latest.end, why: 'silenced' });
    this.#tell('change', {});
  }

  /** Continue with another timeline: after an undo, from a cut, or from a file. @param {Partial<Timeline>} timeline */
  replace(timeline) {
    this.#stop('silenced');
    this.latest = null;
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
      if (!this.#expects(detail.id)) return; // it was silenced meanwhile
      this.timeline.answered.push(...detail.events);
      this.#tell('music', detail);
      this.#tell('change', {});
    } else if (type === 'end') {
      if (!this.latest || !this.#expects(detail.id)) return;
      this.latest.end = detail.at;
      this.#tell('end', detail);
    } else if (type === 'answering') {
      if (this.#expects(detail.id)) this.#tell('answering', detail);
    } else if (type === 'error') {
      this.#tell('problem', detail);
    }
  }

  /** @param {number} code @param {string} reason */
  #lost(code, reason) {
    this.socket = null;
    this.#stop('lost');
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

  /** Whether more may come of this answer. @param {number} id */
  #expects(id) {
    return this.answering && this.latest?.id === id;
  }

  /** Expect no more of an answer; what has come of it stays. @param {string} why */
  #stop(why) {
    if (!this.latest || !this.answering) return;
    const { answered } = this.timeline;
    const last = answered.length ? answered[answered.length - 1][0] : 0;
    this.latest.end = Math.max(this.latest.since, last);
    this.timeline.answered = ended(answered, this.latest.end);
    this.#tell('end', { id: this.latest.id, at: this.latest.end, why });
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
