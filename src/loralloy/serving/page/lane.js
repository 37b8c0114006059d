// One question under one composition: the answer as it comes, and why it is what it is.
import { computed, onBeforeUnmount, reactive } from "./vue.js";
import { ApiError, stream } from "./api.js";
import { Bars, CompositionField, number, share } from "./parts.js";

const CACHE = {
  live: "live, no merge needed",
  hit: "merged before",
  merged: "merged for this request",
  cold: "not merged yet",
};
const ENDS = { stop: "ended by itself", length: "cut at the most tokens" };

/** A lane's state; `run` and `stop` work on it. */
export function makeLane(model) {
  const lane = reactive({ model, busy: false, text: "", told: null, error: "", state: "", pieces: 0, asked: "" });
  let leaving = null;

  lane.stop = () => leaving?.abort();
  lane.run = async (question, settings) => {
    leaving?.abort();
    const mine = (leaving = new AbortController());
    const begun = performance.now();
    Object.assign(lane, { busy: true, text: "", told: null, error: "", state: "Waiting for the first token", pieces: 0 });
    lane.asked = lane.model;
    const own = { neighbours: 5 };
    if (settings.template !== "chat") own.template = settings.template;
    const body = {
      model: lane.model,
      messages: [{ role: "user", content: question }],
      temperature: settings.temperature,
      max_tokens: settings.tokens,
      stream: true,
      stream_options: { include_usage: true },
      loralloy: own,
    };
    if (settings.oneLine) body.stop = ["\n"];
    let end = null;
    let tokens = null;
    const said = () => {
      const seconds = ((performance.now() - begun) / 1000).toFixed(1);
      return `${tokens ?? lane.pieces} token${(tokens ?? lane.pieces) === 1 ? "" : "s"} in ${seconds} s`;
    };
    try {
      for await (const event of stream("v1/chat/completions", body, mine.signal)) {
        if (event.loralloy) lane.told = event.loralloy;
        if (event.usage) tokens = event.usage.completion_tokens;
        const choice = event.choices[0];
        if (!choice) continue;
        lane.text += choice.delta.content || "";
        lane.pieces += choice.delta.content ? 1 : 0;
        end = choice.finish_reason || end;
        lane.state = `Answering, ${said()}`;
      }
      lane.state = `${said()}; ${ENDS[end] || end}`;
    } catch (error) {
      if (mine !== leaving) return; // a newer question has the lane
      if (error.name === "AbortError") lane.state = `Stopped after ${said()}`;
      else {
        lane.state = "";
        lane.error = error instanceof ApiError ? error.message : String(error);
      }
    } finally {
      if (mine === leaving) lane.busy = false;
    }
  };
  return lane;
}

export const Lane = {
  template: "#lane",
  components: { Bars, CompositionField },
  props: { lane: Object, label: String, about: Object, names: Array },
  emits: ["submit", "layers"],
  setup(props) {
    const told = computed(() => props.lane.told);
    const route = computed(() => told.value?.route);
    const facts = computed(() => {
      const t = told.value;
      if (!t) return [];
      const some = Object.keys(t.by_module || {});
      return [
        ["by module", some.length ? `${some.join(", ")}: the bar is the mean` : undefined],
        ["rule", t.rule],
        ["space", t.space],
        ["rank", t.rank],
        ["merge", CACHE[t.cache] || t.cache],
        ["merge error", t.cache === "live" ? "0, exact" : t.error === undefined ? "not known" : number(t.error)],
        ["text sent as", t.template === "chat" ? "a chat" : t.template ? `${t.template}'s form` : "it is"],
      ].filter(([, value]) => value !== undefined && value !== null);
    });
    const unlike = computed(() => share(route.value?.unlike));
    const near = computed(() =>
      (route.value?.neighbours || []).map((n) => ({ ...n, similarity: number(1 - n.distance, 2) })),
    );
    onBeforeUnmount(() => props.lane.stop());
    return { told, route, facts, unlike, near, number };
  },
};
