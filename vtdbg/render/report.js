"use strict";
(function () {
  const SVG = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("data").textContent);

  function make(name, attributes, words) {
    const element = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    if (words !== undefined) element.textContent = words;
    return element;
  }

  function add(parent, name, attributes, words) {
    return parent.appendChild(make(name, attributes, words));
  }

  // ---- address spaces -------------------------------------------------------------------------------------------------------------
  // Addresses are page numbers: a double is exact up to 2**53, a 64-bit address is not.

  const COLUMNS = 64, ROWS = 16, CELL = 14, HEIGHT = 24, GAP = 18, LEFT = 122;
  const FINEST = 1, STEP = 8, LAST_PAGE = Math.pow(2, 52) - 1;

  const hex = (page, rest) => page === 0 && !rest ? "0x0" : "0x" + ((page ? page.toString(16) : "") + (rest || "000")).replace(/^0+(?=.)/, "");

  function size(pages) {
    const units = [[Math.pow(2, 28), "TiB"], [Math.pow(2, 18), "GiB"], [Math.pow(2, 8), "MiB"]];
    for (const [unit, name] of units) if (pages >= unit && pages % unit === 0) return pages / unit + " " + name;
    const [unit, name] = units.find(([unit]) => pages >= 4 * unit) || [1 / 4, "KiB"];
    return (pages / unit % 1 ? "about " + (pages / unit).toFixed(1) : pages / unit) + " " + name;
  }

  const PERMISSION_CLASSES = {
    "rwx": "all", "rwxu": "all", "rw-": "rw", "rw-u": "rw", "r-x": "rx", "r-xu": "rx", "r--": "r", "r--u": "r", "--x": "x", "--xu": "x",
    "---": "none", "----": "none",
  };
  // From what deserves the least of a look to what deserves the most.
  const PROBLEMS = ["", "MMIO", "unreadable", "misconfiguration"];
  const PROBLEM_MARKS = {"MMIO": "~", "unreadable": "?", "misconfiguration": "!"};
  const problemWords = (problem) => ({"MMIO": "KVM's MMIO: every access faults on purpose", "unreadable": "a table that cannot be read"})[problem] || problem;
  const permissionClass = (permissions) => PERMISSION_CLASSES[permissions] || "other";
  const typeClass = (type) => ["WB", "UC", "WC", "WT", "WP"].includes(type) ? type : "other";

  class AddressSpace {
    constructor(figure, picture) {
      this.picture = picture;
      this.pieces = picture.pieces.map(([start, pages, mapped, target, ranges, meanings]) =>
        ({start: start, end: start + pages, mapped: mapped, target: target, ranges: ranges, meanings: meanings.map((index) => picture.meanings[index])}));
      this.hooks = picture.hooks.map(([start, pages, words]) => ({start: start, end: start + pages, words: words}));
      this.detail = picture.detail;
      this.index();
      this.whole = this.wholeCell();
      this.view = {all: true, start: 0, cell: this.whole};
      this.cursor = this.pieces.length ? this.aligned(this.pieces[0].start) : 0;
      this.build(figure);
      this.draw();
    }

    index() {
      let furthest = 0;
      this.ends = this.pieces.map((piece) => (furthest = Math.max(furthest, piece.end)));
    }

    // What was taken together to be seen from afar, range by range; decoded when somebody comes closer.
    unfold() {
      if (!this.detail) return;
      const bytes = atob(this.detail), meanings = this.picture.meanings.map((meaning) => [meaning]), found = [];
      this.detail = "";
      let at = 0, end = 0, target = 0;
      const number = () => {
        let value = 0, factor = 1, byte;
        do { byte = bytes.charCodeAt(at++); value += (byte & 127) * factor; factor *= 128; } while (byte & 128);
        return value;
      };
      while (at < bytes.length) {
        const start = end + number(), pages = number(), meaning = meanings[number()], step = number();
        target += step % 2 ? -(step + 1) / 2 : step / 2;
        found.push({start: start, end: start + pages, mapped: pages, target: target, ranges: 1, meanings: meaning});
        end = start + pages;
        target += pages;
      }
      for (const [start, pages, meaning] of this.picture.faults)
        found.push({start: start, end: start + pages, mapped: 0, target: null, ranges: 0, meanings: meanings[meaning]});
      this.pieces = found.sort((one, two) => one.start - two.start);
      this.index();
    }

    hookAt(first, end) { return this.hooks.find((hook) => hook.start < end && hook.end > first); }

    wholeCell() {
      let cell = FINEST;
      while (cell < Math.pow(2, 46) && this.wholeRows(cell).length > ROWS) cell *= 2;
      return cell;
    }

    wholeRows(cell) {
      const span = cell * COLUMNS, rows = [];
      let reached = -1;
      for (const piece of this.pieces) {
        const last = Math.floor((piece.end - 1) / span);
        for (let row = Math.max(Math.floor(piece.start / span), reached + 1); row <= last; row++) {
          rows.push(row * span);
          reached = row;
          if (rows.length > ROWS) return rows;
        }
      }
      return rows;
    }

    rows() {
      if (this.view.all) return this.wholeRows(this.view.cell);
      return Array.from({length: ROWS}, (_, row) => this.view.start + row * this.view.cell * COLUMNS);
    }

    aligned(page) { return Math.floor(page / this.view.cell) * this.view.cell; }

    from(page) {
      let low = 0, high = this.ends.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (this.ends[middle] > page) high = middle; else low = middle + 1;
      }
      return low;
    }

    touching(first, end) {
      const found = [];
      for (let at = this.from(first); at < this.pieces.length && this.pieces[at].start < end; at++)
        if (this.pieces[at].end > first) found.push(this.pieces[at]);
      return found;
    }

    state(first, end) {
      const permissions = new Set(), types = new Set();
      let covered = 0, problem = "", mark = false, letter = "";
      for (const piece of this.touching(first, end)) {
        if (piece.mapped === piece.end - piece.start) covered += Math.min(piece.end, end) - Math.max(piece.start, first);
        for (const meaning of piece.meanings) {
          if (meaning.problem) problem = PROBLEMS.indexOf(meaning.problem) > PROBLEMS.indexOf(problem) ? meaning.problem : problem;
          else { permissions.add(meaning.perm); types.add(meaning.type); letter = meaning.letter; }
          if (meaning.mark) mark = true;
        }
      }
      if (this.hookAt(first, end)) mark = true;
      const part = permissions.size > 0 && covered < end - first;
      return {permissions: [...permissions].sort(), types: [...types].sort(), part: part, problem: problem, mark: mark, letter: letter,
              key: [[...permissions].sort(), [...types].sort(), part, problem, mark].join("|"), none: !permissions.size && !problem};
    }

    build(figure) {
      const bar = add(figure, "div", {"class": "toolbar", "role": "toolbar", "aria-label": "Zoom"});
      const button = (words, label, action) => {
        const made = add(bar, "button", {"type": "button", "aria-label": label}, words);
        made.addEventListener("click", action);
        return made;
      };
      button("+", "Zoom in at the cursor", () => this.zoomIn());
      button("-", "Zoom out", () => this.zoomOut());
      button("all", "Show everything that is mapped", () => this.showAll());
      const label = add(bar, "label", {}, "address ");
      this.input = add(label, "input", {"type": "text", "spellcheck": "false", "placeholder": "0x...", "autocomplete": "off"});
      this.input.addEventListener("keydown", (event) => { if (event.key === "Enter") this.goTo(this.input.value); });
      this.scale = add(bar, "span", {"class": "dim"});
      add(figure, "p", {"class": "keys"}, "Arrow keys move the cursor, + and - zoom, Home shows everything, N and P go to the next and the previous " +
          "change, H to the next hook, Page Up and Page Down move the window. A double click or the wheel (when the picture has the focus) zooms too.");
      this.svg = add(figure, "svg:svg", {"tabindex": "0", "role": "application", "aria-roledescription": "address-space picture",
                                         "aria-label": this.picture.title + ": arrow keys move, plus and minus zoom"});
      this.readout = add(figure, "p", {"class": "readout", "aria-live": "polite"});
      this.legend(figure);
      this.svg.addEventListener("keydown", (event) => this.key(event));
      this.svg.addEventListener("click", (event) => { this.point(event); });
      this.svg.addEventListener("dblclick", (event) => { this.point(event); this.zoomIn(); });
      this.svg.addEventListener("wheel", (event) => {
        if (document.activeElement !== this.svg) return;
        event.preventDefault();
        this.point(event);
        if (event.deltaY < 0) this.zoomIn(); else this.zoomOut();
      }, {passive: false});
    }

    legend(figure) {
      const list = add(figure, "ul", {"class": "legend", "aria-label": "Legend"});
      const sample = (words, draw) => {
        const item = add(list, "li");
        draw(add(item, "svg:svg", {"viewBox": "0 0 38 22", "aria-hidden": "true"}));
        add(item, "span", {}, words);
      };
      const meanings = this.picture.meanings, names = {"x": " (execute-only)", "rw": " (no execute)", "none": " (nobody)"};
      for (const permissions of new Set(meanings.filter((item) => !item.problem).map((item) => item.perm))) {
        const letter = meanings.find((item) => item.perm === permissions).letter;
        sample(letter + " = " + permissions + (names[permissionClass(permissions)] || ""), (svg) =>
          this.block(svg, 1, 1, 36, 20, {permissions: [permissions], types: [], part: false, problem: "", mark: false, letter: letter}, 0));
      }
      for (const type of new Set(meanings.filter((item) => !item.problem).map((item) => item.type)))
        sample("stripe: memory type " + type, (svg) => add(svg, "svg:path", {"class": "stripe t-" + typeClass(type), "d": "M1 18H37"}));
      sample("* = several of these", (svg) =>
        this.block(svg, 1, 1, 36, 20, {permissions: ["a", "b"], types: [], part: false, problem: "", mark: false, letter: ""}, 0));
      sample("half height: mapped in part", (svg) =>
        this.block(svg, 1, 1, 36, 20, {permissions: ["rwx"], types: [], part: true, problem: "", mark: false, letter: ""}, 0));
      if (this.hooks.length || meanings.some((item) => item.mark)) sample("flag: a hook, execute-only, or read-write without execute", (svg) => this.flag(svg, 8, 4));
      for (const problem of new Set(meanings.map((item) => item.problem).filter(Boolean)))
        sample(PROBLEM_MARKS[problem] + " = " + problemWords(problem), (svg) =>
          this.block(svg, 1, 1, 36, 20, {permissions: [], types: [], part: false, problem: problem, mark: false, letter: ""}, 0));
    }

    flag(svg, x, y, small) {
      add(svg, "svg:path", {"class": "flag", "d": small ? `M${x} ${y}v8h1.5v-3.5h6l-2 -2.2l2 -2.3z` : `M${x} ${y}v11h2v-5h7l-3 -3l3 -3z`});
    }

    block(svg, x, y, width, height, state, cells) {
      if (state.part) { y += height / 2; height /= 2; }
      // Pages beside KVM's MMIO are what one looks for; a mistake beside pages is.
      const problem = state.problem === "MMIO" && state.permissions.length ? "" : state.problem;
      const kind = problem ? {"misconfiguration": "broken", "unreadable": "unreadable", "MMIO": "mmio"}[problem]
        : state.permissions.length > 1 || state.problem ? "several" : permissionClass(state.permissions[0]);
      add(svg, "svg:rect", {"class": "p-" + kind, "x": x, "y": y, "width": width, "height": height});
      if (kind === "several" || kind === "unreadable" || kind === "none") {
        let lines = "";
        for (let at = 6; at < width + height; at += 6) {
          const top = Math.max(0, at - width), bottom = Math.min(at, height);
          lines += `M${x + at - top} ${y + top}L${x + at - bottom} ${y + bottom}`;
        }
        add(svg, "svg:path", {"class": "hatch", "d": lines});
      }
      if (state.types.length) {
        const type = state.types.length > 1 ? "other" : typeClass(state.types[0]);
        add(svg, "svg:path", {"class": "stripe t-" + type, "d": `M${x} ${y + height - 2}H${x + width}`});
      }
      add(svg, "svg:rect", {"class": "edge", "x": x, "y": y, "width": width, "height": height});
      const short = {"broken": "!", "unreadable": "?", "mmio": "~", "several": "*"}[kind] || state.letter;
      const long = problem || kind === "several" ? short : state.permissions[0] + " " + state.types.join("/");
      const words = long.length * 7 + 8 <= width - (state.mark ? 14 : 0) ? long : short;
      if (!state.part || cells === 0 && short) {
        const text = add(svg, "svg:text", {"class": kind === "broken" ? "in alarm" : "in", "x": x + width / 2 + (state.mark && width > 20 ? 5 : 0),
                                           "y": y + (state.mark && width <= 20 ? height - 5 : height / 2 + 3)}, words);
        if (kind === "broken") text.setAttribute("text-anchor", "middle");
      }
      if (state.mark) this.flag(svg, x + 2, y + 1, width <= 20);
    }

    draw() {
      const cell = this.view.cell, span = cell * COLUMNS;
      this.svg.replaceChildren();
      this.places = [];
      let y = 2, reached = this.view.all ? 0 : null;
      for (const start of this.rows()) {
        if (reached !== null && start > reached) {
          add(this.svg, "svg:text", {"class": "gap", "x": LEFT, "y": y + 13}, "... nothing mapped for " + size(start - reached));
          y += GAP;
        }
        reached = this.view.all ? start + span : null;
        add(this.svg, "svg:text", {"class": "label", "x": LEFT - 8, "y": y + 16}, hex(start));
        add(this.svg, "svg:rect", {"class": "empty", "x": LEFT, "y": y, "width": COLUMNS * CELL, "height": HEIGHT - 2});
        let grid = "";
        for (let at = 8; at < COLUMNS; at += 8) grid += `M${LEFT + at * CELL} ${y}v${HEIGHT - 2}`;
        add(this.svg, "svg:path", {"class": "grid", "d": grid});
        if (this.touching(start, start + span).length) this.drawRow(start, y);
        this.places.push({start: start, y: y});
        y += HEIGHT;
      }
      if (!this.places.length) add(this.svg, "svg:text", {"x": LEFT, "y": 20}, "nothing is mapped");
      this.svg.setAttribute("viewBox", `0 0 ${LEFT + COLUMNS * CELL + 4} ${Math.max(y + 2, 30)}`);
      this.halo = add(this.svg, "svg:rect", {"class": "cursor-halo", "width": CELL, "height": HEIGHT - 2});
      this.mark = add(this.svg, "svg:rect", {"class": "cursor", "width": CELL, "height": HEIGHT - 2});
      this.scale.textContent = `a cell is ${size(cell)}, a row ${size(span)}` + (this.view.all ? " (everything that is mapped)" : "");
      this.svg.dataset.cell = cell * 4096;
      this.move(this.cursor);
    }

    drawRow(start, y) {
      const cell = this.view.cell, cells = [];
      for (let at = 0; at < COLUMNS; at++) cells.push(this.state(start + at * cell, start + (at + 1) * cell));
      for (let at = 0; at < COLUMNS;) {
        let end = at + 1;
        while (end < COLUMNS && cells[end].key === cells[at].key) end++;
        if (!cells[at].none) this.block(this.svg, LEFT + at * CELL, y, (end - at) * CELL, HEIGHT - 2, cells[at], end - at);
        at = end;
      }
    }

    place(page) {
      const span = this.view.cell * COLUMNS;
      return this.places.findIndex((row) => page >= row.start && page < row.start + span);
    }

    move(page) {
      if (!this.places.length) { this.say("nothing is mapped"); return; }
      const span = this.view.cell * COLUMNS;
      let row = this.place(page);
      if (row < 0) {
        row = this.places.findIndex((item) => item.start > page);
        if (row < 0) row = this.places.length - 1;
        page = Math.min(Math.max(page, this.places[row].start), this.places[row].start + span - 1);
      }
      this.cursor = this.aligned(page);
      const x = LEFT + (this.cursor - this.places[row].start) / this.view.cell * CELL;
      for (const item of [this.halo, this.mark]) { item.setAttribute("x", x); item.setAttribute("y", this.places[row].y); }
      if (document.activeElement === this.svg) this.halo.scrollIntoView({block: "nearest", inline: "nearest"});
      this.say(this.describe(this.cursor, this.cursor + this.view.cell));
    }

    say(words) { this.readout.textContent = words; }

    describe(first, end) {
      const where = `${hex(first)} to ${hex(end - 1, "fff")}`, found = this.touching(first, end);
      const walk = this.picture.walk.replace("{}", hex(found.length ? Math.max(found[0].start, first) : first));
      const command = walk ? "vtdbg " + walk : "";
      if (!found.length) return `${where}: nothing is mapped. ${command}`;
      const meanings = [...new Set(found.flatMap((piece) => piece.meanings))];
      const words = meanings.slice(0, 6).map((item) => problemWords(item.problem) || `${item.perm} ${item.type} ${item.size}${item.flags ? " " + item.flags : ""}` +
                                             (item.mark ? ` (${item.mark})` : ""));
      const piece = found[0];
      let target = "";
      if (found.length === 1 && piece.target !== null) {
        const skip = Math.max(first - piece.start, 0);
        target = `; goes to ${hex(piece.target + skip)}, in the range ${hex(piece.start)} to ${hex(piece.end - 1, "fff")}`;
      } else if (found.reduce((sum, item) => sum + item.ranges, 0) > 1) {
        target = `; ${found.reduce((sum, item) => sum + item.ranges, 0)} ranges` + (found.some((item) => item.ranges > 1) ? " (taken together)" : "");
      }
      const hook = this.hookAt(first, end);
      return `${where}: ${words.join("; ")}${meanings.length > 6 ? "; ..." : ""}${target}` +
        `${hook ? `; hook at ${hex(hook.start)} (${hook.words})` : ""}. ${command}`;
    }

    showAll() { this.view = {all: true, start: 0, cell: this.whole}; this.draw(); }

    window(page, cell) {
      this.unfold();
      const span = cell * COLUMNS;
      this.view = {all: false, start: Math.max(0, Math.floor(page / span) - ROWS / 2 + 1) * span, cell: cell};
      this.cursor = this.aligned(page);
      this.draw();
    }

    zoomIn() {
      if (this.view.cell === FINEST) { this.say("a cell is one page of 4 KiB: there is nothing finer. " + this.describe(this.cursor, this.cursor + 1)); return; }
      const inside = this.touching(this.cursor, this.cursor + this.view.cell);
      const page = inside.length ? Math.max(inside[0].start, this.cursor) : this.cursor;
      this.window(page, Math.max(FINEST, this.view.cell / STEP));
    }

    zoomOut() {
      if (this.view.all) { this.say("everything that is mapped is shown. " + this.describe(this.cursor, this.cursor + this.view.cell)); return; }
      if (this.view.cell * STEP >= this.whole) this.showAll(); else this.window(this.cursor, this.view.cell * STEP);
    }

    goTo(words) {
      let page;
      try { page = Number(BigInt(words.trim()) / 4096n); } catch (error) { this.say(`${words} is not an address: write 0x1000`); return; }
      if (!(page >= 0 && page <= LAST_PAGE)) { this.say(`${words} is not an address of 64 bits`); return; }
      this.window(page, FINEST);
      this.svg.focus();
    }

    change(direction) {
      const end = this.cursor + this.view.cell;
      const found = direction > 0 ? this.pieces.find((piece) => piece.start >= end)
        : [...this.pieces].reverse().find((piece) => piece.start < this.cursor);
      if (!found) return;
      this.show(found.start);
    }

    nextHook() {
      const found = this.hooks.find((hook) => hook.start >= this.cursor + this.view.cell) || this.hooks[0];
      if (found) this.show(found.start); else this.say("no hooks were found");
    }

    show(page) { if (this.view.all || this.place(page) >= 0) this.move(page); else this.window(page, this.view.cell); }

    step(pages) {
      const page = this.cursor + pages, span = this.view.cell * COLUMNS;
      if (this.view.all) {
        const row = this.place(this.cursor), wanted = this.place(page);
        if (wanted >= 0) { this.move(page); return; }
        const next = this.places[row + Math.sign(pages)];
        if (!next) return;
        const column = this.cursor - this.places[row].start;
        this.move(next.start + (Math.abs(pages) >= span ? column : pages > 0 ? 0 : span - 1));
        return;
      }
      if (page < 0 || page > LAST_PAGE) return;
      if (this.place(page) >= 0) this.move(page); else this.window(page, this.view.cell);
    }

    key(event) {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const cell = this.view.cell, row = cell * COLUMNS;
      const actions = {
        "ArrowLeft": () => this.step(-cell), "ArrowRight": () => this.step(cell), "ArrowUp": () => this.step(-row), "ArrowDown": () => this.step(row),
        "PageUp": () => this.step(-row * (this.view.all ? 1 : ROWS)), "PageDown": () => this.step(row * (this.view.all ? 1 : ROWS)),
        "+": () => this.zoomIn(), "=": () => this.zoomIn(), "Enter": () => this.zoomIn(), "-": () => this.zoomOut(), "Backspace": () => this.zoomOut(),
        "Home": () => this.showAll(), "n": () => this.change(1), "N": () => this.change(1), "p": () => this.change(-1), "P": () => this.change(-1),
        "h": () => this.nextHook(), "H": () => this.nextHook(),
      };
      const action = actions[event.key];
      if (action) { event.preventDefault(); action(); }
    }

    point(event) {
      const box = this.svg.getBoundingClientRect(), view = this.svg.viewBox.baseVal;
      const x = (event.clientX - box.left) / box.width * view.width, y = (event.clientY - box.top) / box.height * view.height;
      const column = Math.floor((x - LEFT) / CELL), row = this.places.find((item) => y >= item.y && y < item.y + HEIGHT);
      if (row && column >= 0 && column < COLUMNS) this.move(row.start + column * this.view.cell);
      this.svg.focus({preventScroll: true});
    }
  }

  // ---- MSR bitmaps ----------------------------------------------------------------------------------------------------------------

  const MSRS = 0x2000, MSR_COLUMNS = 256, MSR_ROWS = MSRS / MSR_COLUMNS, MSR_WIDTH = 4, MSR_HEIGHT = 9, MSR_LEFT = 84;

  class MsrBitmap {
    constructor(figure, picture) {
      add(figure, "p", {"class": "keys"}, "One cell an MSR, 256 a row: the upper half filled is a read that does not exit, the lower half a write that does " +
          "not exit. Arrow keys or the mouse name the MSR; N and P go to the next and the previous one that passes.");
      this.parts = picture.ranges.map((range) => this.part(figure, picture.title, range));
      this.readout = add(figure, "p", {"class": "readout", "aria-live": "polite"});
      const list = add(figure, "ul", {"class": "legend", "aria-label": "Legend"});
      for (const [words, read, write] of [["exits", 0, 0], ["reads pass", 1, 0], ["writes pass", 0, 1], ["both pass", 1, 1]]) {
        const item = add(list, "li"), svg = add(item, "svg:svg", {"viewBox": "0 0 38 22", "aria-hidden": "true"});
        add(svg, "svg:rect", {"class": "msr-exit", "x": 1, "y": 1, "width": 36, "height": 20});
        if (read) add(svg, "svg:rect", {"class": "msr-read", "x": 1, "y": 1, "width": 36, "height": 10});
        if (write) add(svg, "svg:rect", {"class": "msr-write", "x": 1, "y": 11, "width": 36, "height": 10});
        add(item, "span", {}, words);
      }
      this.say(this.parts[0], 0);
    }

    part(figure, title, range) {
      const bits = (words) => Uint8Array.from(atob(words), (letter) => letter.charCodeAt(0));
      const part = {first: range.first, read: bits(range.read), write: bits(range.write), at: 0};
      const height = MSR_ROWS * MSR_HEIGHT;
      const svg = add(figure, "svg:svg", {"viewBox": `0 0 ${MSR_LEFT + MSR_COLUMNS * MSR_WIDTH + 4} ${height + 8}`, "tabindex": "0", "role": "application",
                                          "aria-roledescription": "MSR bitmap",
                                          "aria-label": `${title}: MSRs ${this.name(range.first)} and up; arrow keys name them`});
      add(svg, "svg:rect", {"class": "msr-exit", "x": MSR_LEFT, "y": 3, "width": MSR_COLUMNS * MSR_WIDTH, "height": height});
      for (let row = 0; row < MSR_ROWS; row += 4)
        add(svg, "svg:text", {"class": "label", "x": MSR_LEFT - 8, "y": 3 + row * MSR_HEIGHT + 9}, "0x" + (range.first + row * MSR_COLUMNS).toString(16).padStart(8, "0"));
      add(svg, "svg:path", {"class": "msr-read", "d": this.runs(part.read, 3, 4)});
      add(svg, "svg:path", {"class": "msr-write", "d": this.runs(part.write, 7.5, 4)});
      let lines = "";
      for (let row = 4; row < MSR_ROWS; row += 4) lines += `M${MSR_LEFT} ${3 + row * MSR_HEIGHT - 0.25}h${MSR_COLUMNS * MSR_WIDTH}`;
      add(svg, "svg:path", {"class": "msr-lines", "d": lines});
      part.cursor = add(svg, "svg:rect", {"class": "cursor", "width": MSR_WIDTH + 2, "height": MSR_HEIGHT + 1, "x": MSR_LEFT - 1, "y": 2.5});
      part.tip = add(svg, "svg:title", {}, "");
      svg.addEventListener("keydown", (event) => this.key(part, event));
      svg.addEventListener("focus", () => this.say(part, part.at));
      svg.addEventListener("mousemove", (event) => {
        const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
        const column = Math.floor(((event.clientX - box.left) / box.width * view.width - MSR_LEFT) / MSR_WIDTH);
        const row = Math.floor(((event.clientY - box.top) / box.height * view.height - 3) / MSR_HEIGHT);
        if (column >= 0 && column < MSR_COLUMNS && row >= 0 && row < MSR_ROWS) this.say(part, row * MSR_COLUMNS + column);
      });
      part.svg = svg;
      return part;
    }

    runs(bytes, top, height) {
      const passes = (at) => !(bytes[at >> 3] >> (at & 7) & 1);
      let path = "";
      for (let at = 0; at < MSRS;) {
        if (!passes(at)) { at++; continue; }
        const row = Math.floor(at / MSR_COLUMNS), limit = (row + 1) * MSR_COLUMNS;
        let end = at + 1;
        while (end < limit && passes(end)) end++;
        const width = (end - at) * MSR_WIDTH;
        path += `M${MSR_LEFT + (at % MSR_COLUMNS) * MSR_WIDTH} ${top + row * MSR_HEIGHT}h${width}v${height}h${-width}z`;
        at = end;
      }
      return path;
    }

    name(index) { return "0x" + index.toString(16).padStart(8, "0") + (data.msr_names[index] ? " " + data.msr_names[index] : ""); }

    say(part, at) {
      part.at = at;
      const exits = (bytes) => bytes[at >> 3] >> (at & 7) & 1 ? "exits" : "does not exit";
      const words = `MSR ${this.name(part.first + at)}: RDMSR ${exits(part.read)}, WRMSR ${exits(part.write)}`;
      part.cursor.setAttribute("x", MSR_LEFT + (at % MSR_COLUMNS) * MSR_WIDTH - 1);
      part.cursor.setAttribute("y", 2.5 + Math.floor(at / MSR_COLUMNS) * MSR_HEIGHT);
      part.tip.textContent = words;
      this.readout.textContent = words;
    }

    key(part, event) {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const moves = {"ArrowLeft": -1, "ArrowRight": 1, "ArrowUp": -MSR_COLUMNS, "ArrowDown": MSR_COLUMNS};
      let at = part.at;
      if (event.key in moves) at += moves[event.key];
      else if (event.key === "Home") at = 0;
      else if (event.key === "End") at = MSRS - 1;
      else if ("nNpP".includes(event.key)) {
        const step = "nN".includes(event.key) ? 1 : -1;
        const passes = (index) => !(part.read[index >> 3] >> (index & 7) & 1) || !(part.write[index >> 3] >> (index & 7) & 1);
        do at += step; while (at >= 0 && at < MSRS && !passes(at));
      } else return;
      event.preventDefault();
      if (at >= 0 && at < MSRS) this.say(part, at);
    }
  }

  for (const figure of document.querySelectorAll("figure[data-map]")) new AddressSpace(figure, data.maps[Number(figure.dataset.map)]);
  for (const figure of document.querySelectorAll("figure[data-msr]")) new MsrBitmap(figure, data.msrs[Number(figure.dataset.msr)]);

  // The tree: arrow keys go from link to link, as in a list; Tab works as everywhere.
  const links = [...document.querySelectorAll("nav a")];
  for (const [at, link] of links.entries()) {
    link.addEventListener("keydown", (event) => {
      const target = {"ArrowDown": at + 1, "ArrowUp": at - 1, "Home": 0, "End": links.length - 1}[event.key];
      if (target === undefined || !links[target]) return;
      event.preventDefault();
      links[target].focus();
    });
  }

  // What is folded has to be on paper; it is folded again afterwards.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const item of folded) item.open = true;
  });
  window.addEventListener("afterprint", () => { for (const item of folded) item.open = false; });
})();
