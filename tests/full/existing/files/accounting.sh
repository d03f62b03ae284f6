#!/bin/sh
# The site's own accounting, as its administrator typed it.
set -eux
ask() { sacctmgr -i "$@"; }
ask add cluster faraday
ask modify qos normal set Priority=10 MaxWall=1-0
ask add qos scavenger Priority=0 GraceTime=60 PreemptMode=cancel
ask add qos debug Priority=500 Preempt=scavenger MaxJobsPerUser=2
ask add qos physics_prio Priority=2000 Preempt=scavenger MaxTRESPerUser=cpu=100
ask add account science cluster=faraday Description=Everybody Organization=Faraday
ask add account physics cluster=faraday parent=science Fairshare=10 QOS=normal,physics_prio,scavenger DefaultQOS=physics_prio
ask add account chemistry cluster=faraday parent=science Fairshare=5
ask add user alice cluster=faraday account=physics DefaultAccount=physics Fairshare=3
ask add user bob cluster=faraday account=chemistry DefaultAccount=chemistry
