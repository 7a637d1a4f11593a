#!/bin/bash
# S3: a Ceph cluster of one monitor, one disk and one gateway, in the foreground; $DATA/s3 is made
# at the first start. SIGTERM ends it. Only the gateway listens on other addresses than loopback.
set -euo pipefail
: "${DATA:?}" "${LISTEN:?}" "${S3_PORT:?}" "${MON_PORT:?}" "${S3_GB:?}"
: "${AWS_ACCESS_KEY_ID:?}" "${AWS_SECRET_ACCESS_KEY:?}"
folder=$DATA/s3
mon=[v1:127.0.0.1:$MON_PORT]
export CEPH_CONF=$folder/ceph.conf

random() { cat /proc/sys/kernel/random/uuid; }

keys() { # of the daemons, for each other
    ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool keyring --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *'
    ceph-authtool keyring --gen-key -n client.rgw --cap mon 'allow rw' --cap osd 'allow rwx'
    ceph-authtool --create-keyring osd/keyring --gen-key -n osd.0 \
        --cap mon 'allow profile osd' --cap osd 'allow *'
    ceph-authtool keyring --import-keyring osd/keyring
}

if [ ! -e "$folder/made" ]; then
    mkdir "$folder" || { echo "a first start was cut short: delete $folder" >&2; exit 1; }
    (umask 077 && mkdir "$folder"/{mon,osd,run,log,rgw})
fi
cd "$folder"
[ -e id ] || random > id
cat > ceph.conf <<CONF
[global]
fsid = $(cat id)
mon host = $mon
mon initial members = a
public addr = 127.0.0.1
keyring = $folder/keyring
mon data = $folder/mon
mon allow pool size one = true
osd data = $folder/osd
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class update on start = false
osd crush update on start = false
osd objectstore = bluestore
osd memory target = 1073741824
bluestore block size = $((S3_GB << 30))
run dir = $folder/run
admin socket = $folder/run/\$name.asok
log file = $folder/log/\$name.log
crash dir = $folder/run
auth allow insecure global id reclaim = false
[osd]
keyring = $folder/osd/keyring
[client.rgw]
rgw data = $folder/rgw
rgw frontends = beast endpoint=$LISTEN:$S3_PORT
CONF

daemons=()
end() { # the gateway first: without the others it does not end
    trap '' TERM INT
    for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
        kill "${daemons[i]}" 2> /dev/null || continue
        wait "${daemons[i]}" || true
    done
}
trap end EXIT
trap 'exit 0' TERM INT

if [ ! -e made ]; then
    (umask 077 && keys > /dev/null)
    monmaptool --create --addv a "$mon" --fsid "$(cat id)" monmap > /dev/null
    ceph-mon --mkfs -i a --monmap monmap --keyring keyring
fi
ceph-mon -f -i a > /dev/null 2>&1 & daemons+=($!)
if [ ! -e made ]; then
    random > osd/uuid
    ceph osd new "$(cat osd/uuid)" 0 > /dev/null
    ceph auth import -i osd/keyring 2> /dev/null
    ceph-osd -i 0 --mkfs --osd-uuid "$(cat osd/uuid)"
    ceph osd crush add 0 1.0 root=default 2> /dev/null
fi
ceph-osd -f -i 0 > /dev/null 2>&1 & daemons+=($!)
if [ ! -e made ]; then
    # not as words of the command, which everybody on the machine can list
    CEPH_ARGS="--access-key=$AWS_ACCESS_KEY_ID --secret-key=$AWS_SECRET_ACCESS_KEY" \
        radosgw-admin user create --uid=mlflow --display-name=mlflow > /dev/null
    touch made
fi
radosgw -f -n client.rgw > /dev/null 2>&1 & daemons+=($!)
wait -n # one has ended, so all end
exit 1
