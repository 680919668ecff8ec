// External IAM for tests and benchmarks: oidc-provider 9.13 with RFC 8693 exchange (its policy is ours), refresh with
// rotation, introspection, revocation. node server.js PORT [LOGFILE]; env AT_TTL, RT_TTL (s), ISSUER_SLASH=1
import { generateKeyPairSync } from "node:crypto";
import { openSync, readFileSync, writeSync } from "node:fs";
import { createLocalJWKSet, jwtVerify } from "jose";
import Provider, { errors } from "oidc-provider";

const port = Number(process.argv[2]), log = process.argv[3] ? openSync(process.argv[3], "a") : 1;
const { AT_TTL = 3600, RT_TTL = 86400, AT_FORMAT = "jwt", ISSUER_SLASH = "" } = process.env;
const issuer = `http://127.0.0.1:${port}${ISSUER_SLASH && "/"}`; // no trailing slash by default
const XCHG = "urn:ietf:params:oauth:grant-type:token-exchange", TT = "urn:ietf:params:oauth:token-type:";
const SCOPE = /^storage\.(read|create|modify|stage):(\/[^\s]*)$/, ANY = "https://wlcg.cern.ch/jwt/v1/any";
const jwk = { ...generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey.export({ format: "jwk" }), kid: "op", use: "sig", alg: "ES256" };
const { d, ...pub } = jwk, localJwks = createLocalJWKSet({ keys: [pub] });
const client = (client_id, more) => ({ client_id, redirect_uris: [], response_types: [], client_secret: `${client_id}-secret`, id_token_signed_response_alg: "ES256",
  grant_types: ["client_credentials", "refresh_token", XCHG], token_endpoint_auth_method: "client_secret_basic", ...more });
const clientJwk = JSON.parse(readFileSync(new URL("minter-jwt.jwk.json", import.meta.url)));
const store = new Map(), grants = new Map(); // the default adapter is an LRU of 1000 entries: it loses refresh tokens
class MapAdapter {
  constructor(model) { this.model = model; }
  key(id) { return `${this.model}:${id}`; }
  async upsert(id, payload, ttl) {
    store.set(this.key(id), { payload, until: ttl ? Date.now() + ttl * 1000 : Infinity });
    if (payload.grantId) grants.set(payload.grantId, (grants.get(payload.grantId) ?? new Set()).add(this.key(id)));
  }
  async find(id) { const e = store.get(this.key(id)); return e && e.until > Date.now() ? e.payload : undefined; }
  async consume(id) { store.get(this.key(id)).payload.consumed = Math.floor(Date.now() / 1000); }
  async destroy(id) { store.delete(this.key(id)); }
  async revokeByGrantId(id) { for (const k of grants.get(id) ?? []) store.delete(k); grants.delete(id); }
}
const URN = "urn:client:"; // oidc-provider wants absolute URIs as resources: audience=minter travels as urn:client:minter
const uri = (a) => (/^[a-z]+:/.test(a) ? a : URN + a);
const passing = (scope) => String(scope ?? "").split(" ").filter((s) => SCOPE.test(s)).join(" ");
const resourceInfo = (id, scope) => ({ scope, audience: id.startsWith(URN) ? id.slice(URN.length) : id, accessTokenFormat: AT_FORMAT, accessTokenTTL: +AT_TTL, jwt: { sign: { alg: "ES256" } } });
const provider = new Provider(issuer, {
  adapter: MapAdapter, jwks: { keys: [jwk] }, scopes: ["openid", "offline_access"], rotateRefreshToken: true,
  clients: [client("minter"), client("minter-post", { token_endpoint_auth_method: "client_secret_post" }), client("rucio"),
    client("minter-jwt", { client_secret: undefined, token_endpoint_auth_method: "private_key_jwt", token_endpoint_auth_signing_alg: "ES256", jwks: { keys: [clientJwk] } })],
  findAccount: (ctx, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
  ttl: { AccessToken: () => +AT_TTL, ClientCredentials: () => +AT_TTL, RefreshToken: () => +RT_TTL, Grant: () => +RT_TTL + 60 },
  features: {
    clientCredentials: { enabled: true }, devInteractions: { enabled: false }, introspection: { enabled: true }, revocation: { enabled: true },
    resourceIndicators: { enabled: true, defaultResource: (ctx, c, oneOf) => oneOf?.[0] ?? ANY, useGrantedResource: () => true,
      getResourceServerInfo: (ctx, id) => resourceInfo(id, passing(ctx.oidc.params.scope ?? ctx.oidc.entities.RefreshToken?.scope)) },
  },
  formats: { customizers: { jwt: (ctx, token, jwt) => { jwt.payload["wlcg.ver"] = "1.0"; } } },
});

const covers = (have, want) => { // WLCG: same operation, path below
  const [, a, p] = SCOPE.exec(have) ?? [], [, b, q] = SCOPE.exec(want) ?? [];
  return a && a === b && (p === q || q.startsWith(p.endsWith("/") ? p : `${p}/`));
};
provider.registerGrantType(XCHG, async (ctx) => {
  const { params, client } = ctx.oidc, { clientId } = client;
  if (!params.subject_token || params.subject_token_type !== `${TT}access_token`) throw new errors.InvalidRequest("subject_token(_type) missing or unsupported");
  const want = params.requested_token_type ?? `${TT}access_token`;
  if (![`${TT}access_token`, `${TT}refresh_token`].includes(want)) throw new errors.InvalidRequest("requested_token_type unsupported");
  const { payload } = await jwtVerify(params.subject_token, localJwks, { issuer }).catch((e) => { throw new errors.InvalidGrant(`subject_token: ${e.code}`); });
  if (![payload.aud].flat().some((a) => a === clientId || a === ANY)) throw new errors.InvalidGrant("subject_token: not for this client");
  const had = (payload.scope ?? "").split(" "), asked = passing(params.scope ?? payload.scope).split(" ").filter(Boolean);
  const missing = asked.filter((s) => !had.some((h) => covers(h, s)));
  if (missing.length) throw new errors.InvalidScope("beyond the subject token", missing.join(" "));
  const offline = /(^| )offline_access( |$)/.test(params.scope ?? "") || want === `${TT}refresh_token`;
  const resources = [params.resource ?? uri([payload.aud].flat()[0])].flat(), scope = [...asked, ...(offline ? ["offline_access"] : [])].join(" ");
  const grant = new provider.Grant({ clientId, accountId: payload.sub });
  for (const r of resources) grant.addResourceScope(r, scope);
  const base = { accountId: payload.sub, client, grantId: await grant.save(), gty: XCHG, scope: asked.join(" ") };
  const at = new provider.AccessToken(base);
  at.resourceServer = new provider.ResourceServer(resources[0], resourceInfo(resources[0], asked.join(" ")));
  ctx.body = { access_token: await at.save(), issued_token_type: want, token_type: "Bearer", expires_in: at.expiration, scope };
  if (offline) ctx.body.refresh_token = await new provider.RefreshToken({ ...base, resource: resources, scope, rotations: 0 }).save();
}, ["subject_token", "subject_token_type", "requested_token_type", "scope", "resource"], ["resource"]);

provider.use(async (ctx, next) => { // reads the form (`audience` becomes `resource`) and writes the provider's own log
  const t = Date.now();
  let form = new URLSearchParams();
  if (ctx.method === "POST") {
    const chunks = await ctx.req.toArray();
    form = new URLSearchParams(Buffer.concat(chunks).toString());
    for (const a of form.getAll("audience")) form.append("resource", uri(a));
    form.delete("audience");
    ctx.req.body = Object.fromEntries([...new Set(form.keys())].map((k) => [k, form.getAll(k).length > 1 ? form.getAll(k) : form.get(k)]));
  }
  await next();
  writeSync(log, JSON.stringify({ t, at: new Date(t).toISOString(), method: ctx.method, path: ctx.path, grant_type: form.get("grant_type") ?? undefined,
    client: ctx.oidc?.client?.clientId, status: ctx.status, error: ctx.body?.error, detail: ctx.state.detail, ms: Date.now() - t }) + "\n");
});
for (const e of ["grant.error", "introspection.error", "revocation.error"]) provider.on(e, (ctx, err) => { ctx.state.detail = err.error_detail ?? err.message; });
provider.listen(port, "127.0.0.1", () => writeSync(log, JSON.stringify({ t: Date.now(), ready: issuer, pid: process.pid }) + "\n"));
process.on("SIGTERM", () => process.exit(0));
