#!/bin/sh
# Make an authority, and for each service a folder with a certificate of its and a key, for development. Keys can be read by
# every user of this host: containers have users of their own. The authority's own key stays in the folder above theirs.
set -eu
out=${1:-certificates}
days=365
mkdir -p "$out"
cd "$out"

make_key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:prime256v1 -out "$1"; }

make_key authority.key
openssl req -x509 -key authority.key -days "$days" -subj "/CN=Defuse development" -out authority.pem

for name in redis triton generator distiller corrector gateway client; do
    mkdir -p "$name"
    make_key "$name/key.pem"
    printf 'subjectAltName=DNS:%s,DNS:localhost,IP:127.0.0.1\n' "$name" > extensions
    openssl req -new -key "$name/key.pem" -subj "/CN=$name" -out request
    openssl x509 -req -in request -CA authority.pem -CAkey authority.key -CAcreateserial -days "$days" \
        -extfile extensions -out "$name/certificate.pem" 2> log || { cat log >&2; exit 1; }
    cp authority.pem "$name/"
    chmod a+r "$name/key.pem"
done
rm -f extensions request log authority.srl
echo "certificates are in $PWD"
