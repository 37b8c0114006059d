// Small parts that are used in several places: numbers, bars, the field for a composition.
import { computed, ref, watch } from "./vue.js";
import { ApiError, check } from "./api.js";

export const MOST_BARS = 12;

/** Three digits, and a real minus. */
export function number(value, digits = 3) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 0.001 || size >= 1e5) ? size.toExponential(1) : String(Number(size.toPrecision(digits)));
  return (value < 0 ? "−" : "") + text;
}

/** 0.99963 as 99.9 %: never rounded up to all. */
export const share = (value) =>
  value === null || value === undefined ? "" : `${number(Math.floor(value * 1000) / 10)} %`;

/** The largest weights as [name, weight], and how many are left out with their sum. */
export function topWeights(weights, most = MOST_BARS) {
  const all = Object.entries(weights).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const rest = all.slice(most);
  return { top: all.slice(0, most), more: rest.length, sum: rest.reduce((s, [, w]) => s + w, 0) };
}

/** Weights as horizontal bars, the largest first. */
export const Bars = {
  template: "#bars",
  props: { weights: Object, title: String },
  setup(props) {
    const shown = computed(() => topWeights(props.weights));
    const largest = computed(() => Math.max(1e-12, ...shown.value.top.map(([, w]) => Math.abs(w))));
    const width = (w) => `${Math.max(1, (100 * Math.abs(w)) / largest.value)}%`;
    return { shown, width, number };
  },
};

// The grammar's bare names; what is none goes into quotes.
const BARE = /^[\p{L}_][\p{L}\p{N}_]*(?:[./-][\p{L}\p{N}_]+)*$/u;
export const quoted = (name) =>
  BARE.test(name) && name !== "auto" && name !== "base" ? name : `"${name.replace(/["\\]/g, "\\$&")}"`;

/** What a composition could go on with: whole texts in which the word that is being typed is completed. */
export function completions(text, names, rules, auto) {
  const at = text.lastIndexOf("@");
  if (at >= 0) {
    const [before, word] = [text.slice(0, at + 1), text.slice(at + 1).trimStart()];
    return rules.filter((rule) => rule.startsWith(word) && rule !== word).map((rule) => `${before} ${rule}`);
  }
  const [, before, word] = text.match(/^(.*[\s*+]|[-+]?)([^\s*+]*)$/su) || [null, "", text];
  const sought = word.replace(/^"/, "").toLowerCase();
  const found = names.filter((name) => name.toLowerCase().includes(sought)).map((name) => before + quoted(name));
  const alone = before ? [] : [...(auto ? ["auto"] : []), "base"].filter((name) => name.startsWith(sought));
  return [...alone, ...found];
}

/** A field for a composition: a choice to filter, free text, and the server's word on it under the field. */
export const CompositionField = {
  template: "#composition-field",
  props: { modelValue: String, label: String, about: Object, names: Array },
  emits: ["update:modelValue", "submit"],
  setup(props, { emit }) {
    const options = ref([]);
    const problem = ref(null);
    let asked = null;
    let timer = 0;

    let typing = false; // a field that was only opened offers everything

    const set = (text) => emit("update:modelValue", text ?? "");
    const type = (text) => {
      typing ||= text !== props.modelValue;
      set(text);
    };
    const rest = () => (typing = false);
    const enter = (text, done) => {
      done(text, "add"); // what was typed stands
      emit("submit");
    };
    const filter = (text, update) =>
      update(() => {
        const said = completions(typing ? text : "", props.names, props.about.rules || [], props.about.auto);
        options.value = said.filter((option) => !typing || option !== text);
      });

    async function look(text) {
      asked?.abort();
      asked = new AbortController();
      try {
        await check(text, asked.signal);
        problem.value = null;
      } catch (error) {
        if (error instanceof ApiError && (error.status === 400 || error.status === 404)) {
          const at = error.position;
          // the text stands in the field above; what is left to say is the place and the reason
          const reason = error.message.replace(/^composition '.*', character \d+: |^composition ".*", character \d+: /s, "");
          const mark = [...text];
          problem.value = {
            reason: at === null ? reason : `Character ${at + 1}: ${reason}`,
            before: at === null ? null : mark.slice(Math.max(0, at - 24), at).join(""),
            at: at === null ? null : mark[at] || "␣",
            after: at === null ? null : mark.slice(at + 1, at + 13).join(""),
          };
        }
      }
    }

    watch(
      () => props.modelValue,
      (text) => {
        clearTimeout(timer);
        asked?.abort(); // its word would be on what stood here before
        if (!text.trim()) problem.value = { reason: "Give a composition.", before: null };
        else timer = setTimeout(() => look(text), 250);
      },
    );
    return { options, problem, set, type, rest, enter, filter };
  },
};
