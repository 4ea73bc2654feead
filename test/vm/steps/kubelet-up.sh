# Starts etcd, the API server and the kubelet as units of systemd, with the settings that change control groups. Arguments
# are further lines of the kubelet's configuration.
. ./lib.sh

dir=/var/lib/cri-vm-kubernetes
mkdir -p $dir
cd $dir
[ -e sa.key ] || { openssl genrsa -out sa.key 2048 && openssl rsa -in sa.key -pubout -out sa.pub; } 2> /dev/null
echo 'vm,admin,admin,system:masters' > tokens.csv
cat > kubeconfig <<'END'
apiVersion: v1
kind: Config
clusters: [{name: vm, cluster: {server: "https://127.0.0.1:6443", insecure-skip-tls-verify: true}}]
users: [{name: vm, user: {token: vm}}]
contexts: [{name: vm, context: {cluster: vm, user: vm}}]
current-context: vm
END
cat > kubelet.yaml <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix://$socket
failSwapOn: false
memorySwap: {swapBehavior: LimitedSwap}
resolvConf: /etc/resolv.conf
evictionHard: {memory.available: "50Mi", nodefs.available: "1%", imagefs.available: "1%", nodefs.inodesFree: "1%"}
imageGCHighThresholdPercent: 100
$(printf '%s\n' "$@")
END

if [ -z "$(swapon --show --noheadings)" ]; then
	dd if=/dev/zero of=/swapfile bs=1M count=512 status=none
	chmod 600 /swapfile
	mkswap -q /swapfile
	swapon /swapfile
fi

systemctl stop vm-etcd vm-apiserver vm-kubelet 2> /dev/null || true
# volumes of a kubelet that was killed
awk '$2 ~ "^/var/lib/kubelet/" { print $2 }' /proc/mounts | xargs -r umount
rm -rf etcd /var/lib/kubelet/{cpu_manager_state,memory_manager_state,pods}
# unit NAME PROGRAM ARGUMENTS...
unit() {
	local name=$1 program=$2
	shift 2
	systemd-run --quiet --collect --unit="vm-$name" -p Restart=on-failure -p RestartSec=5 -p WorkingDirectory=$dir \
		-p OOMScoreAdjust=-900 "$root/kubernetes/$program" "$@"
}
address=$(ip -4 -o address show scope global | awk '{ sub("/.*", "", $4); print $4; exit }')
unit etcd etcd --data-dir etcd --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
	--listen-peer-urls http://127.0.0.1:2380 --log-level warn
unit apiserver kube-apiserver --etcd-servers http://127.0.0.1:2379 --authorization-mode AlwaysAllow --token-auth-file tokens.csv \
	--service-account-issuer https://kubernetes.default --service-account-key-file sa.pub \
	--service-account-signing-key-file sa.key --service-cluster-ip-range 10.96.0.0/16 --cert-dir certs --bind-address 127.0.0.1 \
	--advertise-address "$address" --disable-admission-plugins ServiceAccount --allow-privileged
await 600 kubectl get --raw /readyz
await 60 kubectl get namespace default
unit kubelet kubelet --config kubelet.yaml --kubeconfig kubeconfig --hostname-override vm --node-ip "$address" --v 2
is_ready() { kubectl get node vm -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}' | grep -q True; }
await 300 is_ready
