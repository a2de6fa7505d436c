/* Listening on the page: one clock for the takes of an example, switched without a click, at equal
   loudness. A classic script, because from file:// nothing else loads; audio comes as base64 in
   scripts of its own (data/NAME.js), because scripts are all a page from a file may read. */
"use strict";
(function () {
  const SWITCH_S = 0.006; // time constant of a switch: nine tenths of the way in 14 ms
  const EDGE_S = 0.005; // fades at both ends of a clip, so that the loop has no seam
  const TAIL_S = 1.0; // silence after the clip while rendering: browsers stop filters early
  const groups = JSON.parse(document.getElementById("examples-data").textContent);
  const arriving = new Map(); // clip name -> {promise, resolve}
  const contexts = new Map(); // sample rate -> {context, output}
  let playing = null; // the group that plays

  // ---- audio

  function bytesOf(name) {
    if (!arriving.has(name)) {
      const entry = {};
      entry.promise = new Promise(function (resolve, reject) {
        entry.resolve = resolve;
        const script = document.createElement("script");
        script.src = "data/" + name + ".js";
        script.onerror = function () {
          arriving.delete(name);
          reject(new Error("data/" + name + ".js did not load"));
        };
        document.head.appendChild(script);
      });
      arriving.set(name, entry);
    }
    return arriving.get(name).promise;
  }

  function put(name, base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
    if (arriving.has(name)) arriving.get(name).resolve(bytes);
  }

  async function decoded(name, rate) {
    const bytes = await bytesOf(name);
    return new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes.slice().buffer);
  }

  /* What the equaliser makes of a clip: a filter node for each section, in double precision. */
  async function equalised(buffer, sections, gain) {
    const rate = buffer.sampleRate;
    const offline = new OfflineAudioContext(1, buffer.length + Math.round(TAIL_S * rate), rate);
    const padded = offline.createBuffer(1, offline.length, rate);
    padded.copyToChannel(buffer.getChannelData(0), 0);
    let node = offline.createBufferSource();
    node.buffer = padded;
    node.start();
    for (const s of sections) {
      node = node.connect(offline.createIIRFilter(s.slice(0, 3), s.slice(3)));
    }
    const level = offline.createGain();
    level.gain.value = gain;
    node.connect(level).connect(offline.destination);
    const rendered = await offline.startRendering();
    return rendered.getChannelData(0).slice(0, buffer.length);
  }

  /* The samples of every take of an example, as its files hold them. */
  async function samplesOf(group) {
    const dry = new Map();
    for (const take of group.takes) {
      const name = take.from || take.clip;
      if (!dry.has(name)) dry.set(name, await decoded(name, group.rate));
    }
    const found = [];
    for (const take of group.takes) {
      const source = dry.get(take.from || take.clip);
      found.push(take.from
        ? await equalised(source, take.sos, Math.pow(10, take.preamp_db / 20))
        : source.getChannelData(0).slice());
    }
    return found;
  }

  function faded(context, samples, rate) {
    const edge = Math.round(EDGE_S * rate);
    const buffer = context.createBuffer(1, samples.length, rate);
    const copy = samples.slice();
    for (let i = 0; i < edge; i += 1) {
      const weight = 0.5 - 0.5 * Math.cos(Math.PI * (i + 0.5) / edge);
      copy[i] *= weight;
      copy[copy.length - 1 - i] *= weight;
    }
    buffer.copyToChannel(copy, 0);
    return buffer;
  }

  function contextOf(rate) {
    if (!contexts.has(rate)) {
      const context = new AudioContext({ sampleRate: rate });
      const output = context.createGain();
      output.connect(context.destination);
      contexts.set(rate, { context: context, output: output });
    }
    return contexts.get(rate);
  }

  // ---- one example

  function Group(fieldset) {
    const name = fieldset.dataset.example;
    const group = groups[name];
    const button = fieldset.querySelector(".play");
    const radios = Array.from(fieldset.querySelectorAll("input[type=radio]"));
    const seek = fieldset.querySelector("input[type=range]");
    const match = fieldset.querySelector("input[type=checkbox]");
    const said = fieldset.querySelector("output");
    const self = { running: false, sources: [], gains: [] };
    let samples = null, asked = 0, began = 0, offset = 0, timer = 0, context = null;

    const chosen = function () { return Math.max(0, radios.findIndex((radio) => radio.checked)); };
    const gainDb = function (i) { return match.checked ? group.takes[i].match_db : 0; };
    const level = function (i) { return Math.pow(10, gainDb(i) / 20); };
    const position = function () {
      return self.running ? (offset + Math.max(0, context.currentTime - began)) % group.seconds : offset;
    };

    function tell() {
      const take = group.takes[chosen()];
      const db = gainDb(chosen());
      said.value = take.label + (db < 0 ? ", turned down by " + (-db).toFixed(1) + " dB" : ", as it is");
    }

    function show() {
      const at = position();
      seek.value = at.toFixed(2);
      seek.setAttribute("aria-valuetext", at.toFixed(1) + " of " + group.seconds.toFixed(1) + " seconds");
      button.dataset.running = String(self.running);
      button.textContent = self.running ? "Pause" : "Play";
    }

    /* An approach begins at whatever value the audio thread has by then. A ramp would have to be
       cancelled, and to begin at a value read here, which is late: that clicks. For takes that are
       still to begin it begins with them, in place of the approach that waits for them there. */
    function approach(gain, value) {
      gain.setTargetAtTime(value, Math.max(context.currentTime, began), SWITCH_S);
    }

    function levels() {
      if (self.running) self.gains.forEach((node, i) => approach(node.gain, i === chosen() ? level(i) : 0));
    }

    function begin(at) {
      const place = contextOf(group.rate);
      context = place.context;
      began = context.currentTime + 0.03;
      offset = at;
      self.sources = [];
      self.gains = [];
      group.takes.forEach(function (take, i) {
        const source = context.createBufferSource();
        source.buffer = faded(context, samples[i], group.rate);
        source.loop = true;
        const node = new GainNode(context, { gain: 0 });
        if (i === chosen()) node.gain.setTargetAtTime(level(i), began, SWITCH_S);
        source.connect(node).connect(place.output);
        source.start(began, at % source.buffer.duration);
        self.sources.push(source);
        self.gains.push(node);
      });
    }

    function end() {
      const sources = self.sources, gains = self.gains;
      gains.forEach((node) => approach(node.gain, 0));
      sources.forEach((source) => source.stop(context.currentTime + 15 * SWITCH_S));
    }

    self.pause = function () {
      asked += 1;
      if (!self.running) return;
      const at = position();
      end();
      self.running = false;
      offset = at;
      clearInterval(timer);
      if (playing === self) playing = null;
      samples = null; // a few megabytes an example
      show();
    };

    self.play = async function () {
      asked += 1;
      const mine = asked;
      if (playing && playing !== self) playing.pause();
      document.querySelectorAll("audio").forEach((element) => element.pause());
      playing = self;
      const place = contextOf(group.rate); // made inside the click, so that it may sound
      const resumed = place.context.resume();
      try {
        if (!samples) {
          said.value = "loading";
          samples = await samplesOf(group);
        }
        await resumed;
      } catch (error) {
        said.value = "cannot be played: " + error.message;
        return;
      }
      if (mine !== asked) return tell(); // paused, or another example, while it was loading
      begin(offset);
      self.running = true;
      timer = setInterval(show, 100);
      tell();
      show();
    };

    self.seek = function (at) {
      const to = Math.min(Math.max(at, 0), group.seconds - 0.01);
      if (self.running) {
        end();
        begin(to);
      } else {
        offset = to;
      }
      show();
    };

    self.choose = function (i) {
      if (i >= radios.length) return;
      radios[i].checked = true;
      levels();
      tell();
    };

    const toggle = function () { return self.running ? self.pause() : self.play(); };
    button.addEventListener("click", toggle);
    radios.forEach((radio, i) => radio.addEventListener("change", () => self.choose(i)));
    match.addEventListener("change", function () { levels(); tell(); });
    seek.addEventListener("input", () => self.seek(Number(seek.value)));
    fieldset.addEventListener("keydown", function (event) {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const on = event.target;
      const arrow = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === " " && (on === button || on.type === "radio" || on === seek)) {
        toggle();
      } else if (event.key >= "1" && event.key <= "9") {
        self.choose(Number(event.key) - 1);
      } else if (arrow && on.type !== "radio") { // among the takes, arrows choose
        self.seek(position() + arrow);
      } else {
        return;
      }
      event.preventDefault();
    });
    // A button's click comes with the key going up: it has been answered already.
    button.addEventListener("keyup", function (event) { if (event.key === " ") event.preventDefault(); });

    fieldset.querySelector(".save").addEventListener("click", async function () {
      const i = group.takes.findIndex((take) => take.label === "Processed");
      try {
        save(group.takes[i].clip + ".wav", wav((await samplesOf(group))[i], group.rate));
      } catch (error) {
        said.value = "cannot be downloaded: " + error.message;
      }
    });
    show();
  }

  // ---- files and the clipboard

  function wav(samples, rate) {
    const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
    const word = function (at, text) {
      for (let i = 0; i < text.length; i += 1) view.setUint8(at + i, text.charCodeAt(i));
    };
    word(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true);
    word(8, "WAVEfmt "); view.setUint32(16, 16, true); view.setUint16(20, 1, true);
    view.setUint16(22, 1, true); view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true);
    view.setUint16(32, 2, true); view.setUint16(34, 16, true);
    word(36, "data"); view.setUint32(40, 2 * samples.length, true);
    samples.forEach(function (value, i) {
      const whole = Math.max(-32768, Math.min(32767, Math.round(32768 * value)));
      view.setInt16(44 + 2 * i, whole, true);
    });
    return new Blob([view.buffer], { type: "audio/wav" });
  }

  function save(name, blob) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    document.body.appendChild(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch (error) { // not every browser lets a page from a file
      const area = document.createElement("textarea");
      area.value = text;
      document.body.appendChild(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) throw error;
    }
  }

  function onCopy(event) {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const text = button.dataset.json
      ? JSON.stringify(groups[button.dataset.json].settings, null, 2) + "\n"
      : document.getElementById(button.dataset.copy).textContent + "\n";
    const before = button.dataset.label || button.textContent;
    button.dataset.label = before;
    copy(text).then(() => "Copied", () => "Not allowed: select the text").then(function (words) {
      button.textContent = words;
      setTimeout(function () { button.textContent = before; }, 2000);
    });
  }

  // ---- the page

  document.querySelectorAll("fieldset.compare").forEach(function (fieldset) {
    fieldset.hidden = false;
    Group(fieldset);
  });
  document.addEventListener("click", onCopy);
  document.addEventListener("play", function (event) { // one at a time
    if (playing) playing.pause();
    document.querySelectorAll("audio").forEach(function (element) {
      if (element !== event.target) element.pause();
    });
  }, true);
  let opened = [];
  window.addEventListener("beforeprint", function () { // what is folded would not be printed
    opened = Array.from(document.querySelectorAll("details:not([open])"));
    opened.forEach(function (part) { part.open = true; });
  });
  window.addEventListener("afterprint", function () {
    opened.forEach(function (part) { part.open = false; });
    opened = [];
  });

  /* put: called by data/NAME.js. The rest is for whoever measures what is heard. */
  window.EQST = { put: put, groups: groups, samplesOf: samplesOf, contexts: contexts };
})();
