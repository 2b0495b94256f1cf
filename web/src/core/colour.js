// Colours by name, in two themes; the map's ramp; the heads' hues. The painters turn names into colours.

export const THEMES = {
  light: {
    paper: "#fbfaf7", ink: "#1c1b19", soft: "#5e5a53", faint: "#dcd8cf", wash: "#f1eee7", accent: "#0072b2",
    hue0: "#0072b2", hue1: "#d55e00", hue2: "#00805e", hue3: "#b0548a", hue4: "#b97f00", hue5: "#2f86bd", warn: "#a8321a",
  },
  dark: {
    paper: "#15171a", ink: "#ebe8e2", soft: "#a5a199", faint: "#34373c", wash: "#1e2125", accent: "#56b4e9",
    hue0: "#56b4e9", hue1: "#e69f00", hue2: "#1fbf90", hue3: "#cc79a7", hue4: "#f0e442", hue5: "#ee7b30", warn: "#ff9a80",
  },
};

export const HUES = 6;
export const hue = (index) => `hue${index % HUES}`;

// The second signal beside a hue, so that no reader needs the colour.
const DASHES = ["", "9 4", "3 3", "12 3 3 3", "6 2 2 2 2 2", "2 5"];
export function dash(index, width = 1) {
  const pattern = DASHES[index % HUES];
  const wide = Math.max(1, width / 4);
  return pattern && wide > 1 ? pattern.split(" ").map((n) => Math.round(n * wide * 10) / 10).join(" ") : pattern;
}

function oklab(hex) {
  const [r, g, b] = [1, 3, 5].map((i) => {
    const value = parseInt(hex.slice(i, i + 2), 16) / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

function rgb([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((value) => {
    const clipped = Math.min(1, Math.max(0, value));
    return Math.round(255 * (clipped <= 0.0031308 ? 12.92 * clipped : 1.055 * clipped ** (1 / 2.4) - 0.055));
  });
}

// Perceptually even: lightness moves in equal steps from the background (zero) to the far end; hues follow viridis.
const STOPS = {
  light: ["#fbfaf7", "#b9de8c", "#35b779", "#21918c", "#31688e", "#443983", "#3b0a50"],
  dark: ["#15171a", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725"],
};

const ramps = {};
export function ramp(theme) {
  if (ramps[theme]) return ramps[theme];
  const stops = STOPS[theme].map(oklab);
  const [low, high] = [stops[0][0], stops[stops.length - 1][0]];
  const colours = [];
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (stops.length - 1);
    const n = Math.min(stops.length - 2, Math.floor(at));
    const mix = (axis) => stops[n][axis] + (stops[n + 1][axis] - stops[n][axis]) * (at - n);
    colours.push(rgb([low + (high - low) * (i / 255), mix(1), mix(2)]));
  }
  ramps[theme] = colours;
  return colours;
}

export const hex = (colour) => `#${colour.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
