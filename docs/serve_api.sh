#!/usr/bin/env bash
# Call every operation of the HTTP API of a running service with curl; stop at the first unexpected status.
#   [WEBHOOK_SECRET="$(cat .relook/keys/webhook-secret)"] \
#   URL=http://127.0.0.1:8000 KEY="$(cat .relook/keys/admin-key)" docs/serve_api.sh IMAGE [CANDIDATE_MODEL]
# KEY needs the scope admin, and `relook labels value` must have run once. At the end the script erases the image that it
# sent. With CANDIDATE_MODEL, that model's full id, it rolls the model out, promotes it and undoes that: the model serves
# for a moment and is refused afterwards.
set -euo pipefail
IMAGE=$1 CANDIDATE=${2:-}
URL=${URL:-http://127.0.0.1:8000}
body=$(mktemp) && sent=$(mktemp) && trap 'rm -f "$body" "$sent"' EXIT

call() { # STATUS VERB PATH [curl options]: send and compare the status with the expected one
  local expected=$1 verb=$2 path=$3 got
  shift 3
  if [ -n "$KEY" ]; then set -- -H "Authorization: Bearer $KEY" "$@"; fi
  got=$(curl -sS -o "$body" -w '%{http_code}' -X "$verb" "$@" "$URL$path")
  if [ "$got" != "$expected" ]; then echo "$verb $path: $got, expected $expected: $(head -c 400 "$body")" >&2; exit 1; fi
  echo "$got $verb $path"
}
field() { sed -E "s/.*\"$1\":\"?([^\",}]*).*/\1/" < <(grep -oE "\"$1\":\"?[^\",}]*" "$body" | head -1); }
JSON=(-H 'Content-Type: application/json')

# health and models
call 200 GET  /healthz
call 200 GET  /readyz
call 200 GET  /v1/model
model=$(field id)
call 200 GET  /v1/models
call 200 GET  "/v1/models/$model"
if [ "$(field has_report)" = true ]; then call 200 GET "/v1/models/$model/report"; fi
call 200 GET  /v1/rounds
call 200 GET  /v1/labels/value
call 200 GET  /v1/caller
call 200 GET  /metrics
call 200 GET  /docs
call 200 GET  /openapi.json

# predictions: raw body, form with context, repeated with one Idempotency-Key, batch
call 200 POST '/v1/predictions?explain=gradcam' -H 'Content-Type: image/jpeg' --data-binary "@$IMAGE"
id=$(field id) image=$(field image_id)
call 200 POST /v1/predictions -F "image=@$IMAGE" -F 'context={"age": 61, "localization": "back"};type=application/json'
key="tour-$RANDOM-$RANDOM-$$"
call 200 POST /v1/predictions -H "Idempotency-Key: $key" -H 'Content-Type: image/jpeg' --data-binary "@$IMAGE"
first=$(field id)
call 200 POST /v1/predictions -H "Idempotency-Key: $key" -H 'Content-Type: image/jpeg' --data-binary "@$IMAGE"
[ "$(field id)" = "$first" ] || { echo "a repeated key gave another prediction" >&2; exit 1; }
call 200 POST /v1/predictions/batch -F "image=@$IMAGE" -F "image=@$IMAGE" \
  -F 'context=[{"lesion_id": "L1"}, {"lesion_id": "L1"}];type=application/json'
call 200 POST /v1/predictions -F "file=@$IMAGE"
{ printf '{"image_base64": "'; base64 "$IMAGE" | tr -d '\n'; printf '", "context": {"age": 61}}'; } > "$sent"
call 200 POST /v1/predictions "${JSON[@]}" --data-binary "@$sent"
call 200 GET  "/v1/predictions/$id"
call 200 GET  "/v1/predictions/$id?wait=0.5"
call 200 GET  '/v1/predictions?decision=review&limit=5'

# the same by the Open Inference Protocol, with the image as base64 and, behind the JSON, as it is
call 200 GET  /v2
call 200 GET  /v2/health/live
call 200 GET  /v2/health/ready
call 200 GET  /v2/models/relook
call 200 GET  /v2/models/relook/ready
call 200 GET  "/v2/models/relook/versions/$model"
call 200 GET  "/v2/models/relook/versions/$model/ready"
tensor='"name": "image", "datatype": "BYTES", "shape": [1]'
{ printf '{"inputs": [{%s, "data": ["' "$tensor"; base64 "$IMAGE" | tr -d '\n'; printf '"]}]}'; } > "$sent"
call 200 POST /v2/models/relook/infer "${JSON[@]}" --data-binary "@$sent"
call 200 POST "/v2/models/relook/versions/$model/infer" "${JSON[@]}" --data-binary "@$sent"
size=$(wc -c < "$IMAGE")
head=$(printf '{"inputs": [{%s, "parameters": {"binary_data_size": %d}}], "outputs": [{"name": "label"}]}' "$tensor" $((size + 4)))
{ printf '%s' "$head"; printf "$(printf '\\x%02x' $((size & 255)) $((size >> 8 & 255)) $((size >> 16 & 255)) 0)"; cat "$IMAGE"; } > "$sent"
call 200 POST /v2/models/relook/infer -H "Inference-Header-Content-Length: ${#head}" --data-binary "@$sent"

# heat maps of a stored prediction, and of an image that is not stored
for method in gradcam integrated_gradients gradient_shap occlusion; do
  call 200 GET "/v1/predictions/$id/explanation?method=$method&target=mel"
done
call 200 GET  "/v1/predictions/$id/explanation?target=mel&versus=nv"
call 200 GET  "/v1/predictions/$id/explanation?format=png"
call 200 GET  "/v1/predictions/$id/explanation?format=npy"
call 200 GET  "/v1/predictions/$id/nearest?limit=3"
call 200 GET  "/v1/predictions/$id/print"
call 200 POST '/v1/explanations?method=gradcam' -H 'Content-Type: image/jpeg' --data-binary "@$IMAGE"

# flags, outcomes and events
call 200 POST "/v1/predictions/$id/flags" "${JSON[@]}" -d '{"reason": "wrong_label", "suggested_label": "mel"}'
call 200 POST "/v1/predictions/$id/outcomes" "${JSON[@]}" \
  -d '{"diagnosis": "mel", "confirmation": "histopathology", "observed_at": "2026-01-15T09:00:00Z"}'
call 200 GET  '/v1/events?limit=5'
call 200 GET  "/v1/events?prediction_id=$id"

# incidents, as `relook incident` opened them, and its report
call 200 GET  /v1/incidents
incident=$(field id)
if [ "$(field has_report)" = true ]; then call 200 GET /v1/incidents/report; fi
if [ -n "$incident" ]; then
  call 200 GET  "/v1/incidents/$incident"
  call 200 GET  "/v1/incidents/$incident/page"
fi

# a rollout of a candidate in shadow, rolled back; a second one, promoted and undone
if [ -n "$CANDIDATE" ]; then
  start="{\"model\": \"$CANDIDATE\", \"percent\": 0, \"champion\": \"$model\", \"reason\": \"a tour\"}"
  call 200 POST   /v1/rollout "${JSON[@]}" -d "$start"
  rollout=$(field id)
  call 200 GET    /v1/rollout
  call 200 DELETE "/v1/rollout?rollout=$rollout&reason=the%20tour%20ends"
  call 200 DELETE "/v1/rollout?rollout=$rollout"
  promote="{\"model\": \"$CANDIDATE\", \"percent\": 100, \"rollout\": \"$rollout\"}"
  call 409 POST   /v1/rollout "${JSON[@]}" -d "$promote"
  call 200 POST   /v1/rollout "${JSON[@]}" -d "$start"
  call 200 POST   /v1/rollout "${JSON[@]}" -d "${promote/$rollout/$(field id)}"
  call 200 POST   "/v1/models/$CANDIDATE/undo-promotion" "${JSON[@]}" -d "{\"back_to\": \"$model\", \"reason\": \"a tour\"}"
fi
call 404 GET  /v1/rollout

# a browser is signed in and out; the page does this
call 200 POST   /v1/session
call 204 DELETE /v1/session

# the webhook of Label Studio
if [ -n "${WEBHOOK_SECRET:-}" ]; then
  call 204 POST /v1/webhooks/label-studio -H "X-Relook-Webhook-Secret: $WEBHOOK_SECRET" "${JSON[@]}" -d '{"action": "ANNOTATION_CREATED"}'
fi
call 403 POST /v1/webhooks/label-studio -H 'X-Relook-Webhook-Secret: guessed'

# consent that is taken back, and erasure
call 200 PATCH  "/v1/images/$image" "${JSON[@]}" -d '{"consent": "review"}'
call 409 PATCH  "/v1/images/$image" "${JSON[@]}" -d '{"consent": "training"}'
call 422 PATCH  "/v1/images/$image" "${JSON[@]}" -d '{"consent": "display"}'
call 200 DELETE "/v1/images/$image"

# wrong requests
call 404 GET  /v1/predictions/00000000000000000000000000000000
call 415 POST /v1/predictions -H 'Content-Type: image/jpeg' -d 'text'
call 422 POST /v1/predictions -F "image=@$IMAGE" -F 'contxt={"consent": "none"}'
call 405 GET  /v1/predictions/batch
call 404 GET  /v2/models/resnet
KEY=nobody call 401 GET /v1/models
echo "every response had the expected status"
