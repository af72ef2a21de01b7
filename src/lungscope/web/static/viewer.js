// One film on a canvas: zoom, pan, window and level, and the layers over it.

const COLOURS = { right: "#4cc9f0", left: "#8cf096" };
const SCORES = ["#dfe5ec", "#f8d27a", "#ee8b4a", "#c43a31"];
const MAX_ZOOM = 24;
// The view: zoom 1 shows the whole film; (x, y) is the film's point in the middle, as shares of its sides.
const WHOLE = { zoom: 1, x: 0.5, y: 0.5 };

/** What a zone's score is made of. A grade is cut, not rounded: so it lies on its score's side of each limit. */
export const measured = ({ grade, extent_percent: extent }) =>
  grade === null ? `${extent.toFixed(0)} %` : `grade ${(Math.floor(1000 * grade) / 1000).toFixed(3)}`;

export class Viewer {
  /** layers: shared by all viewers, { lungs, evidence, zones } as opacity 0..1. onchange: called after a gesture. */
  constructor(canvas, layers, onchange) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.layers = layers;
    this.onchange = onchange;
    this.dragsWindow = false;
    this.pointers = new Map();
    this.picture = null;
    this.clear();
    new ResizeObserver(() => this.draw()).observe(canvas);
    this.listen();
  }

  clear() {
    this.picture?.film.close();
    this.picture?.heat?.close();
    this.picture = null;
    this.grey = this.toned = null;
    this.tone = { window: 100, level: 50, invert: false };
    this.look(WHOLE);
  }

  /** picture: { film, heat } as ImageBitmaps, and the shapes of layers.json. */
  show(picture) {
    this.clear();
    const path = (rings) => {
      const whole = new Path2D();
      for (const ring of rings) {
        ring.forEach(([x, y], at) => (at ? whole.lineTo(x, y) : whole.moveTo(x, y)));
        whole.closePath();
      }
      return whole;
    };
    const { shapes } = picture;
    this.picture = {
      ...picture,
      lungs: Object.entries(shapes.lungs).map(([side, rings]) => ({ side, path: path(rings) })),
      zones: shapes.zones.map((zone) => ({ ...zone, path: path(zone.outline) })),
    };
    this.drawNow();
  }

  // Geometry -------------------------------------------------------------------------------------------------------

  get fit() {
    const { width, height } = this.picture.shapes;
    return Math.min(this.canvas.clientWidth / width, this.canvas.clientHeight / height);
  }

  /** CSS pixels of the canvas per pixel of the film, and where the film's corner is. */
  get frame() {
    const { width, height } = this.picture.shapes;
    const scale = this.fit * this.view.zoom;
    return {
      scale,
      left: this.canvas.clientWidth / 2 - this.view.x * width * scale,
      top: this.canvas.clientHeight / 2 - this.view.y * height * scale,
    };
  }

  look(view) {
    const zoom = Math.min(MAX_ZOOM, Math.max(1, view.zoom));
    const inside = (value) => Math.min(1, Math.max(0, value));
    this.view = zoom === 1 ? WHOLE : { zoom, x: inside(view.x), y: inside(view.y) };
    this.canvas.classList.toggle("whole", zoom === 1);
    this.draw();
  }

  /** Zoom by `factor`; what lies at (x, y) of the canvas stays there, its middle where none is given. */
  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    if (!this.picture) return;
    const { width, height } = this.picture.shapes;
    const before = this.frame;
    const zoom = Math.min(MAX_ZOOM, Math.max(1, this.view.zoom * factor));
    const scale = this.fit * zoom;
    const at = { x: (x - before.left) / before.scale, y: (y - before.top) / before.scale };
    this.look({
      zoom,
      x: (at.x + (this.canvas.clientWidth / 2 - x) / scale) / width,
      y: (at.y + (this.canvas.clientHeight / 2 - y) / scale) / height,
    });
    this.onchange(this);
  }

  pan(dx, dy) {
    if (!this.picture) return;
    const { width, height } = this.picture.shapes;
    const { scale } = this.frame;
    this.look({ ...this.view, x: this.view.x - dx / scale / width, y: this.view.y - dy / scale / height });
    this.onchange(this);
  }

  whole() {
    this.look(WHOLE);
    this.onchange(this);
  }

  retone(change) {
    const tone = { ...this.tone, ...change };
    tone.window = Math.round(Math.min(150, Math.max(5, tone.window)));
    tone.level = Math.round(Math.min(100, Math.max(0, tone.level)));
    this.tone = tone;
    this.toned = null;
    this.draw();
    this.onchange(this);
  }

  // Drawing --------------------------------------------------------------------------------------------------------

  draw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    cancelAnimationFrame(this.waiting);
    this.waiting = 0;
    const { canvas, context, picture } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    if (!picture) return;
    const { scale, left, top } = this.frame;
    context.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * left, ratio * top);
    context.imageSmoothingQuality = "high";
    context.imageSmoothingEnabled = scale * ratio < 4;
    const { shapes } = picture;
    context.drawImage(this.inTone(), 0, 0, shapes.width, shapes.height);
    context.imageSmoothingEnabled = true;
    if (this.layers.evidence && picture.heat) {
      context.globalAlpha = this.layers.evidence;
      context.drawImage(picture.heat, 0, 0, shapes.width, shapes.height);
      context.globalAlpha = 1;
      if (shapes.peak) this.drawPeak(shapes.peak, scale);
    }
    if (this.layers.zones) this.drawZones(scale);
    if (this.layers.lungs) {
      context.globalAlpha = this.layers.lungs;
      for (const { side, path } of picture.lungs) this.stroke(path, COLOURS[side], 2 / scale);
      context.globalAlpha = 1;
    }
  }

  stroke(path, colour, width, dash = []) {
    const { context } = this;
    context.lineJoin = "round";
    context.lineWidth = width;
    context.strokeStyle = colour;
    context.setLineDash(dash);
    context.stroke(path);
    context.setLineDash([]);
  }

  drawPeak([x, y], scale) {
    const mark = new Path2D();
    mark.arc(x, y, 9 / scale, 0, 2 * Math.PI);
    for (const [dx, dy] of [
      [1, 0],
      [-1, 0],
      [0, 1],
      [0, -1],
    ]) {
      mark.moveTo(x + (6 * dx) / scale, y + (6 * dy) / scale);
      mark.lineTo(x + (14 * dx) / scale, y + (14 * dy) / scale);
    }
    this.context.globalAlpha = this.layers.evidence;
    this.stroke(mark, "#000", 4 / scale);
    this.stroke(mark, "#fff", 2 / scale);
    this.context.globalAlpha = 1;
  }

  drawZones(scale) {
    const { context } = this;
    for (const zone of this.picture.zones) {
      context.globalAlpha = this.layers.zones * (zone.score ? 0.75 : 0.25);
      context.fillStyle = SCORES[zone.score];
      context.fill(zone.path);
      context.globalAlpha = Math.max(0.7, this.layers.zones);
      this.stroke(zone.path, COLOURS[zone.side], 1.5 / scale, [6 / scale, 5 / scale]);
      context.globalAlpha = 1;
      this.write(`${zone.letter} · ${zone.score}`, zone.label, 0, 700, 16, scale);
      this.write(measured(zone), zone.label, 17, 500, 13, scale);
    }
  }

  write(text, [x, y], below, weight, size, scale) {
    const { context } = this;
    context.font = `${weight} ${size / scale}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.lineWidth = 4 / scale;
    context.lineJoin = "round";
    context.strokeStyle = "rgba(0, 0, 0, 0.75)";
    context.fillStyle = "#fff";
    context.strokeText(text, x, y + below / scale);
    context.fillText(text, x, y + below / scale);
  }

  /** The film through window, level and inversion; the film itself where they change nothing. */
  inTone() {
    const { window: width, level, invert } = this.tone;
    const { film } = this.picture;
    if (width === 100 && level === 50 && !invert) return film;
    if (this.toned) return this.toned;
    this.sheet ??= document.createElement("canvas");
    const sheet = this.sheet;
    const context = sheet.getContext("2d", { willReadFrequently: true });
    if (!this.grey) {
      [sheet.width, sheet.height] = [film.width, film.height];
      context.drawImage(film, 0, 0);
      this.pixels = context.getImageData(0, 0, film.width, film.height);
      const words = new Uint32Array(this.pixels.data.buffer);
      this.grey = Uint8Array.from(words, (word) => word & 255);
    }
    const table = new Uint32Array(256);
    for (let value = 0; value < 256; value++) {
      const share = Math.min(1, Math.max(0, (value / 255 - level / 100) / (width / 100) + 0.5));
      const shade = Math.round(255 * (invert ? 1 - share : share));
      table[value] = 0xff000000 | (shade << 16) | (shade << 8) | shade;
    }
    const words = new Uint32Array(this.pixels.data.buffer);
    for (let at = 0; at < words.length; at++) words[at] = table[this.grey[at]];
    context.putImageData(this.pixels, 0, 0);
    return (this.toned = sheet);
  }

  // Gestures -------------------------------------------------------------------------------------------------------

  listen() {
    const { canvas, pointers } = this;
    const place = (event) => ({ x: event.offsetX, y: event.offsetY });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, place(event));
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, (event) => pointers.delete(event.pointerId));
    }
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before || !this.picture) return;
      const now = place(event);
      pointers.set(event.pointerId, now);
      if (pointers.size === 2) {
        const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
        const apart = (point) => Math.hypot(point.x - other.x, point.y - other.y);
        if (apart(before) > 0) this.zoom(apart(now) / apart(before), (now.x + other.x) / 2, (now.y + other.y) / 2);
        this.pan((now.x - before.x) / 2, (now.y - before.y) / 2);
      } else if (this.dragsWindow || event.shiftKey || event.buttons === 2) {
        const { window: width, level } = this.tone;
        this.retone({ window: width + (now.x - before.x) / 3, level: level + (now.y - before.y) / 4 });
      } else {
        this.pan(now.x - before.x, now.y - before.y);
      }
    });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("dblclick", () => this.picture && this.whole());
    canvas.addEventListener(
      "wheel",
      (event) => {
        if (!this.picture) return;
        event.preventDefault();
        this.zoom(Math.exp(-event.deltaY / (event.deltaMode ? 12 : 400)), event.offsetX, event.offsetY);
      },
      { passive: false },
    );
  }
}
